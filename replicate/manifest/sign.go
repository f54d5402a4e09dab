package manifest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
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
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, keyErrorf(file, "%v", err)
	}
	key, ok := k.(ed25519.PrivateKey)
	if !ok {
		return nil, keyErrorf(file, "it is a key for %s, not Ed25519", algorithm(k))
	}
	return key, nil
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
	k, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, keyErrorf(file, "%v", err)
	}
	key, ok := k.(ed25519.PublicKey)
	if !ok {
		return nil, keyErrorf(file, "it is a key for %s, not Ed25519", algorithm(k))
	}
	return key, nil
}

func keyErrorf(file, format string, a ...any) error {
	return fmt.Errorf("cannot read key %s: %w: %s", file, ErrKey, fmt.Sprintf(format, a...))
}

func algorithm(key any) string {
	switch key.(type) {
	case *rsa.PrivateKey, *rsa.PublicKey:
		return "RSA"
	case *ecdsa.PrivateKey, *ecdsa.PublicKey:
		return "ECDSA"
	}
	return "another algorithm"
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
