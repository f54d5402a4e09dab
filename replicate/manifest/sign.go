package manifest

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ed25519"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
)

// maxKey bounds the size of a key file in bytes.
const maxKey = 64 << 10

var (
	// ErrKey is returned for a file that is no Ed25519 key of the kind that is wanted.
	ErrKey = errors.New("the key cannot be used")

	// ErrSignature is returned when a signature is missing, or is not that of the file by the key.
	ErrSignature = errors.New("the signature is not valid")
)

// ReadPrivateKey reads the key to sign with: PKCS #8 in PEM, as `openssl genpkey -algorithm ed25519` writes it (RFC 8410,
// "Private Key Format").
func ReadPrivateKey(file string) (ed25519.PrivateKey, error) {
	block, err := readPEM(file)
	if err != nil {
		return nil, err
	}
	switch block.Type {
	case "PRIVATE KEY":
	case "ENCRYPTED PRIVATE KEY":
		return nil, keyErrorf(file, "it is encrypted; `openssl pkey -in FILE -out FILE` makes one that is not")
	case "PUBLIC KEY":
		return nil, keyErrorf(file, "it is a public key, and signing needs the private one")
	default:
		return nil, keyErrorf(file, "it holds %.40q, not the private key that `openssl genpkey -algorithm ed25519` makes", block.Type)
	}
	var outer struct { // RFC 5958, "Asymmetric Key Package": what may follow is of no use here
		Version   int
		Algorithm algorithm
		Key       []byte
	}
	var seed []byte
	if err = whole(asn1.Unmarshal(block.Bytes, &outer)); err == nil {
		err = outer.Algorithm.check()
	}
	if err == nil {
		err = whole(asn1.Unmarshal(outer.Key, &seed))
	}
	if err == nil && len(seed) != ed25519.SeedSize {
		err = fmt.Errorf("its seed has %d bytes, and one of Ed25519 has %d", len(seed), ed25519.SeedSize)
	}
	if err != nil {
		return nil, keyErrorf(file, "%v", err)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// ReadPublicKey reads the key to check signatures with: PKIX in PEM, as `openssl pkey -pubout` writes it (RFC 8410,
// "Subject Public Key Fields").
func ReadPublicKey(file string) (ed25519.PublicKey, error) {
	block, err := readPEM(file)
	if err != nil {
		return nil, err
	}
	switch block.Type {
	case "PUBLIC KEY":
	case "PRIVATE KEY", "ENCRYPTED PRIVATE KEY":
		return nil, keyErrorf(file, "it is a private key; `openssl pkey -in FILE -pubout` gives the public one, and the other is to stay where it is")
	default:
		return nil, keyErrorf(file, "it holds %.40q, not the public key that `openssl pkey -pubout` gives", block.Type)
	}
	var outer struct { // RFC 5280, "Subject Public Key Info"
		Algorithm algorithm
		Key       asn1.BitString
	}
	if err = whole(asn1.Unmarshal(block.Bytes, &outer)); err == nil {
		err = outer.Algorithm.check()
	}
	if n := outer.Key.BitLength; err == nil && n != 8*ed25519.PublicKeySize {
		err = fmt.Errorf("it has %d bits, and one of Ed25519 has %d", n, 8*ed25519.PublicKeySize)
	}
	if err != nil {
		return nil, keyErrorf(file, "%v", err)
	}
	return ed25519.PublicKey(outer.Key.Bytes), nil
}

func keyErrorf(file, format string, a ...any) error {
	return fmt.Errorf("cannot read key %s: %w: %s", file, ErrKey, fmt.Sprintf(format, a...))
}

// algorithm is an AlgorithmIdentifier: RFC 5280, "Signature Algorithm". crypto/x509 knows it too, and adds 0.8 MB to the program.
type algorithm struct {
	OID        asn1.ObjectIdentifier
	Parameters asn1.RawValue `asn1:"optional"`
}

// oidEd25519 is id-Ed25519, which has no parameters: RFC 8410, "Curve25519 and Curve448 Algorithm Identifiers".
var oidEd25519 = asn1.ObjectIdentifier{1, 3, 101, 112}

func (a *algorithm) check() error {
	others := map[string]string{"1.2.840.113549.1.1.1": "RSA", "1.2.840.10045.2.1": "ECDSA", "1.3.101.113": "Ed448"}
	switch {
	case !a.OID.Equal(oidEd25519):
		return fmt.Errorf("it is a key for %s, not Ed25519", cmp.Or(others[a.OID.String()], "another algorithm"))
	case len(a.Parameters.FullBytes) > 0:
		return errors.New("it has parameters, and a key for Ed25519 has none")
	}
	return nil
}

// whole is the error of a structure that something follows.
func whole(rest []byte, err error) error {
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("there are %d more bytes behind its end", len(rest))
	}
	return err
}

// readPEM reads the one block of a file. Of two keys nobody could say which one counts.
func readPEM(file string) (*pem.Block, error) {
	data, err := readLimited(file, maxKey)
	if err != nil {
		return nil, fmt.Errorf("cannot read key %s: %w", file, err)
	}
	block, rest := pem.Decode(data)
	switch {
	case bytes.Count(data, []byte("-----BEGIN ")) > 1:
		return nil, keyErrorf(file, "it holds more than one block")
	case block == nil:
		return nil, keyErrorf(file, "it is not PEM")
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, keyErrorf(file, "something follows the key")
	}
	return block, nil
}

// readLimited reads a file once. It may be a pipe, which has no size.
func readLimited(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, bare(err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, bare(err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("it has more than %d bytes", limit)
	}
	return data, nil
}

// Sign gives the signature of a file: 64 bytes, Ed25519 over its bytes as they are (RFC 8032, "Ed25519").
func Sign(key ed25519.PrivateKey, data []byte) ([]byte, error) {
	sig, err := key.Sign(nil, data, crypto.Hash(0))
	if err != nil {
		return nil, fmt.Errorf("cannot sign: %w", err)
	}
	return sig, nil
}

// SignatureSuffix is what the name of a manifest's signature has behind that of the manifest.
const SignatureSuffix = ".sig"

// Load reads a manifest. With a key, the signature beside it has to be there and valid before anything of it is looked
// at. The file is read once: what was checked is what is used. signed says that there is a signature, checked or not.
func Load(file string, key ed25519.PublicKey) (m *Manifest, signed bool, err error) {
	fail := func(err error) (*Manifest, bool, error) {
		return nil, signed, fmt.Errorf("cannot use manifest %s: %w", file, err)
	}
	data, err := readLimited(file, MaxSize)
	if err != nil {
		return fail(err)
	}
	if _, err := os.Stat(file + SignatureSuffix); err == nil {
		signed = true
	}
	if key != nil {
		sig, err := readLimited(file+SignatureSuffix, ed25519.SignatureSize)
		if err != nil {
			return fail(fmt.Errorf("%w: %s: %w", ErrSignature, file+SignatureSuffix, err))
		}
		if len(sig) != ed25519.SignatureSize {
			return fail(fmt.Errorf("%w: %s has %d bytes, a signature has %d", ErrSignature, file+SignatureSuffix, len(sig), ed25519.SignatureSize))
		}
		if !ed25519.Verify(key, data, sig) {
			return fail(fmt.Errorf("%w: %s is not that of this file by this key", ErrSignature, file+SignatureSuffix))
		}
	}
	if m, err = Decode(data); err != nil {
		return fail(err)
	}
	return m, signed, nil
}
