package manifest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"espmirror/fixtures"
	"espmirror/replicate"
)

// put writes a file of a test.
func put(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// block is one block of PEM.
func block(t *testing.T, kind string, der []byte, err error) []byte {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// keys writes key.pem and pub.pem, and returns what they hold.
func keys(t *testing.T) (ed25519.PrivateKey, ed25519.PublicKey) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	put(t, "key.pem", block(t, "PRIVATE KEY", der, err))
	der, err = x509.MarshalPKIXPublicKey(pub)
	put(t, "pub.pem", block(t, "PUBLIC KEY", der, err))
	return key, pub
}

func TestKeys(t *testing.T) {
	t.Chdir(t.TempDir())
	key, pub := keys(t)
	if got, err := ReadPrivateKey("key.pem"); err != nil || !got.Equal(key) {
		t.Error(err)
	}
	if got, err := ReadPublicKey("pub.pem"); err != nil || !got.Equal(pub) {
		t.Error(err)
	}
	private, _ := os.ReadFile("key.pem")
	public, _ := os.ReadFile("pub.pem")
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ecDER, err := x509.MarshalPKCS8PrivateKey(ec)
	ecPrivate := block(t, "PRIVATE KEY", ecDER, err)
	ecDER, err = x509.MarshalPKIXPublicKey(ec.Public())
	ecPublic := block(t, "PUBLIC KEY", ecDER, err)
	for _, c := range []struct {
		name            string
		data            []byte
		private, public string
	}{
		{"empty", nil, "it is not PEM", "it is not PEM"},
		{"text", []byte("secret\n"), "it is not PEM", "it is not PEM"},
		{"the other", private, "", "it is a private key"},
		{"the one", public, "it is a public key", ""},
		{"ECDSA", ecPrivate, "for ECDSA, not Ed25519", "it is a private key"},
		{"ECDSA public", ecPublic, "it is a public key", "for ECDSA, not Ed25519"},
		{"encrypted", block(t, "ENCRYPTED PRIVATE KEY", []byte{1}, nil), "it is encrypted", "it is a private key"},
		{"older form", block(t, "RSA PRIVATE KEY", []byte{1}, nil), `"RSA PRIVATE KEY"`, `"RSA PRIVATE KEY"`},
		{"certificate", block(t, "CERTIFICATE", []byte{1}, nil), `"CERTIFICATE"`, `"CERTIFICATE"`},
		{"no key in it", block(t, "PRIVATE KEY", []byte{1}, nil), "the key cannot be used: ", "it is a private key"},
		{"no public key in it", block(t, "PUBLIC KEY", []byte{1}, nil), "it is a public key", "the key cannot be used: "},
		{"two", append(bytes.Clone(private), private...), "more than one block", "more than one block"},
		{"both", append(bytes.Clone(private), public...), "more than one block", "more than one block"},
		{"something behind", append(bytes.Clone(private), "x"...), "something follows", "something follows"},
		{"large", make([]byte, maxKey+1), "more than", "more than"},
	} {
		put(t, "file", c.data)
		_, err := ReadPrivateKey("file")
		if (err == nil) != (c.private == "") || err != nil && !strings.Contains(err.Error(), c.private) {
			t.Errorf("%s as a private key: %v, want %q", c.name, err, c.private)
		}
		_, err = ReadPublicKey("file")
		if (err == nil) != (c.public == "") || err != nil && !strings.Contains(err.Error(), c.public) {
			t.Errorf("%s as a public key: %v, want %q", c.name, err, c.public)
		}
	}
	for _, name := range []string{"missing", "."} {
		if _, err := ReadPrivateKey(name); err == nil {
			t.Errorf("%s is a key", name)
		}
		if _, err := ReadPublicKey(name); err == nil {
			t.Errorf("%s is a key", name)
		}
	}
}

// TestOpenSSL has openssl make the keys and judge the signature, and sign in our place.
func TestOpenSSL(t *testing.T) {
	fixtures.Need(t, "openssl")
	t.Chdir(t.TempDir())
	openssl := func(args ...string) error {
		out, err := exec.Command("openssl", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("openssl %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	for _, args := range []string{"genpkey -algorithm ed25519 -out key.pem", "pkey -in key.pem -pubout -out pub.pem",
		"genpkey -algorithm ed25519 -aes256 -pass pass:x -out locked.pem", "genpkey -algorithm ed448 -out other.pem"} {
		if err := openssl(strings.Fields(args)...); err != nil {
			t.Fatal(err)
		}
	}
	key, err := ReadPrivateKey("key.pem")
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ReadPublicKey("pub.pem")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadPrivateKey("locked.pem"); err == nil || !strings.Contains(err.Error(), "encrypted") {
		t.Error(err)
	}
	if _, err := ReadPrivateKey("other.pem"); !errors.Is(err, ErrKey) {
		t.Error(err)
	}
	if err := Store("m.json", encode(t, example(t)), key); err != nil {
		t.Fatal(err)
	}
	verify := strings.Fields("pkeyutl -verify -pubin -inkey pub.pem -rawin -in m.json -sigfile m.json.sig")
	if err := openssl(verify...); err != nil {
		t.Error(err)
	}
	fixtures.Count("openssl", 1)
	if err := openssl(strings.Fields("pkeyutl -sign -inkey key.pem -rawin -in m.json -out m.json.sig")...); err != nil {
		t.Fatal(err)
	}
	if _, signed, err := Load("m.json", pub); err != nil || !signed {
		t.Error(err)
	}
	data, _ := os.ReadFile("m.json")
	data[100] ^= 1
	put(t, "m.json", data)
	if openssl(verify...) == nil {
		t.Error("openssl takes a changed file")
	}
	if _, _, err := Load("m.json", pub); !errors.Is(err, ErrSignature) {
		t.Error(err)
	}
}

func TestLoad(t *testing.T) {
	t.Chdir(t.TempDir())
	key, pub := keys(t)
	other, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	data := encode(t, example(t))
	if err := Store("m", data, nil); err != nil {
		t.Fatal(err)
	}
	if m, signed, err := Load("m", nil); err != nil || signed || len(m.Images) != 3 {
		t.Error(signed, err)
	}
	if _, _, err := Load("m", pub); !errors.Is(err, ErrSignature) || !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := Store("m", data, key); err != nil {
		t.Fatal(err)
	}
	if _, signed, err := Load("m", pub); err != nil || !signed {
		t.Error(err)
	}
	if _, signed, err := Load("m", nil); err != nil || !signed {
		t.Error(err)
	}
	if _, _, err := Load("m", other); !errors.Is(err, ErrSignature) {
		t.Error(err)
	}
	sig, _ := os.ReadFile("m.sig")
	for i := range sig {
		bad := bytes.Clone(sig)
		bad[i] ^= 1
		put(t, "m.sig", bad)
		if _, _, err := Load("m", pub); !errors.Is(err, ErrSignature) {
			t.Errorf("byte %d of the signature: %v", i, err)
		}
	}
	for _, bad := range [][]byte{nil, sig[:63], append(bytes.Clone(sig), 0)} {
		put(t, "m.sig", bad)
		if _, _, err := Load("m", pub); !errors.Is(err, ErrSignature) {
			t.Errorf("%d bytes of signature: %v", len(bad), err)
		}
	}
	// What is not signed is not looked at: the signature is what is wrong, whatever else is.
	put(t, "m", []byte("rubbish"))
	put(t, "m.sig", sig)
	if _, _, err := Load("m", pub); !errors.Is(err, ErrSignature) || errors.Is(err, ErrNotManifest) {
		t.Error(err)
	}
	if _, _, err := Load("m", nil); !errors.Is(err, ErrNotManifest) {
		t.Error(err)
	}
	if _, _, err := Load("missing", nil); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := os.Truncate("m", MaxSize+1); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Load("m", nil); err == nil || !strings.Contains(err.Error(), "more than 268435456 bytes") {
		t.Error(err)
	}
}

// TestStoreFaults lets each step fail, or end the program. Afterwards there is the old pair, the new pair, or one that does
// not verify; and never a new manifest without its signature.
func TestStoreFaults(t *testing.T) {
	t.Chdir(t.TempDir())
	key, pub := keys(t)
	old := encode(t, example(t))
	m := example(t)
	m.Images[0].Volumes[0].Serial = "0000-0001"
	data := encode(t, m)
	reset := func(before bool) {
		t.Helper()
		left, err := filepath.Glob(tempPattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range append(left, "m", "m.sig") {
			_ = os.Remove(name)
		}
		if before {
			if err := Store("m", old, key); err != nil {
				t.Fatal(err)
			}
		}
	}
	judge := func(before bool, what string) {
		t.Helper()
		have, err := os.ReadFile("m")
		if err != nil && (before || !errors.Is(err, fs.ErrNotExist)) || err == nil && !bytes.Equal(have, data) && !(before && bytes.Equal(have, old)) {
			t.Errorf("%s: neither the old manifest nor the new one: %v", what, err)
		}
		_, _, verr := Load("m", pub)
		if bytes.Equal(have, data) && verr != nil {
			t.Errorf("%s: the new manifest is there, and does not verify: %v", what, verr)
		}
		if err != nil && verr == nil {
			t.Errorf("%s: nothing verifies", what)
		}
	}
	for _, before := range []bool{false, true} {
		reset(before)
		var steps []string
		if err := (store{func(step string) error { steps = append(steps, step); return nil }}).write("m", data, key); err != nil {
			t.Fatal(err)
		}
		judge(before, "whole")
		if got := strings.Join(steps, ", "); got != "create, write, chmod, sync file, create, write, chmod, sync file, rename, sync directory, rename, sync directory" {
			t.Errorf("the steps are %s", got)
		}
		for i, name := range steps {
			what := fmt.Sprintf("step %d, %s, before %v", i, name, before)
			boom := errors.New("boom")
			fail := func() store {
				n := 0
				return store{func(string) error {
					if n++; n == i+1 {
						return boom
					}
					return nil
				}}
			}
			reset(before)
			if err := fail().write("m", data, key); !errors.Is(err, boom) {
				t.Errorf("%s: %v", what, err)
			}
			judge(before, what+" fails")
			if left, _ := filepath.Glob(tempPattern); len(left) > 0 {
				t.Errorf("%s: left behind: %v", what, left)
			}
			fixtures.Count("faults", 1)
			// The same as a cut: nothing is cleaned up. And the next run is not disturbed by what is left.
			reset(before)
			func() {
				defer func() { _ = recover() }()
				n := 0
				_ = store{func(string) error {
					if n++; n == i+1 {
						panic("cut")
					}
					return nil
				}}.write("m", data, key)
			}()
			judge(before, what+" is cut")
			if err := Store("m", data, key); err != nil {
				t.Errorf("%s: the next run: %v", what, err)
			}
			judge(before, what+" and the next run")
		}
	}
}

func TestStoreRefuses(t *testing.T) {
	t.Chdir(t.TempDir())
	key, _ := keys(t)
	data := encode(t, example(t))
	for _, c := range []struct {
		name   string
		make   func()
		signed bool
		want   string
	}{
		{"a foreign file", func() { put(t, "m", []byte("precious")) }, false, "is not a manifest"},
		{"a short one", func() { put(t, "m", []byte("{")) }, false, "is not a manifest"},
		{"a directory", func() { _ = os.Mkdir("m", 0o755) }, false, "no regular file"},
		{"a link", func() { _ = os.Symlink("elsewhere", "m") }, false, "no regular file"},
		{"a foreign signature", func() { put(t, "m.sig", []byte("precious")) }, true, "is not a signature"},
		{"a signature that would stay", func() { put(t, "m.sig", make([]byte, 64)) }, false, "would not be that of the new manifest"},
		{"a directory for a signature", func() { _ = os.Mkdir("m.sig", 0o755) }, true, "is not a signature"},
		{"an empty file", func() { put(t, "m", nil) }, false, ""},
		{"empty files", func() { put(t, "m", nil); put(t, "m.sig", nil) }, true, ""},
		{"another version's", func() { put(t, "m", []byte("{\n  \"format\": \"espmirror manifest 9\"\n}\n")) }, true, ""},
		{"an old pair", func() { put(t, "m", data); put(t, "m.sig", make([]byte, 64)) }, true, ""},
	} {
		_, _ = os.RemoveAll("m"), os.RemoveAll("m.sig")
		c.make()
		k := key
		if !c.signed {
			k = nil
		}
		for _, err := range []error{CheckStore("m", c.signed), Store("m", data, k)} {
			if (err == nil) != (c.want == "") || err != nil && (!strings.Contains(err.Error(), c.want) || !errors.Is(err, replicate.ErrRefused)) {
				t.Errorf("%s: %v, want %q", c.name, err, c.want)
			}
		}
	}
	for _, err := range []error{CheckStore("missing/m", false), Store("missing/m", data, nil)} {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	}
	if left, _ := filepath.Glob(tempPattern); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	info, err := os.Stat("m")
	if err != nil || info.Mode() != 0o644 {
		t.Error(info, err)
	}
}
