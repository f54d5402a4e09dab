package manifest

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"espmirror/replicate"
)

// tempPattern is how the files are called while they are written.
const tempPattern = ".espmirror-manifest-*"

// CheckStore says, before a long run, whether Store would do: the directory is there and can be written, and what is in the
// place of the manifest and of its signature may go. An error that wraps replicate.ErrRefused is for what may not.
func CheckStore(file string, signed bool) error {
	fail := func(err error) error { return fmt.Errorf("cannot write manifest %s: %w", file, err) }
	if err := mayReplace(file); err != nil {
		return fail(err)
	}
	if err := mayReplaceSignature(file+SignatureSuffix, signed); err != nil {
		return fail(err)
	}
	f, err := os.CreateTemp(filepath.Dir(file), tempPattern)
	if err != nil {
		return fail(bare(err))
	}
	if err := errors.Join(f.Close(), os.Remove(f.Name())); err != nil {
		return fail(bare(err))
	}
	return nil
}

// bare takes the path from an error whose message has it already.
func bare(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// mayReplace refuses what is no manifest, unless it is empty.
func mayReplace(file string) error {
	info, err := os.Lstat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return bare(err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: it is there, and no regular file", replicate.ErrRefused)
	}
	f, err := os.Open(file)
	if err != nil {
		return bare(err)
	}
	defer f.Close()
	head := make([]byte, 64)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return bare(err)
	}
	if n > 0 && !IsManifest(head[:n]) {
		return fmt.Errorf("%w: it is there, and is not a manifest", replicate.ErrRefused)
	}
	return nil
}

// mayReplaceSignature refuses what cannot be a signature; and any signature when the new manifest gets none, beside which
// the old one would look like its own.
func mayReplaceSignature(file string, signed bool) error {
	info, err := os.Lstat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return bare(err)
	case !info.Mode().IsRegular() || info.Size() != 0 && info.Size() != ed25519.SignatureSize:
		return fmt.Errorf("%w: %s is there, and is not a signature", replicate.ErrRefused, file)
	case !signed:
		return &replicate.Hint{Err: fmt.Errorf("%w: %s is there, and would not be that of the new manifest", replicate.ErrRefused, file),
			Text: "sign the new one too, or remove the old signature"}
	}
	return nil
}

// Store writes a manifest, and beside it its signature when there is a key. Each file is the old one or the new one after
// a power cut, whole, and the signature comes first: a manifest that was published with a signature is never there
// without one, and the new signature beside the old manifest fits nothing. So whoever checks finds the old pair, the new
// pair, or no valid one.
func Store(file string, data []byte, key ed25519.PrivateKey) error {
	return store{}.write(file, data, key)
}

// store does what Store does. A test lets a step fail by check, which is called before each; it is nil otherwise.
type store struct{ check func(step string) error }

// step carries out one call that makes something durable or visible.
func (s store) step(name string, do func() error) error {
	if s.check != nil {
		if err := s.check(name); err != nil {
			return err
		}
	}
	return bare(do())
}

func (s store) write(file string, data []byte, key ed25519.PrivateKey) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot write manifest %s: %w", file, err)
		}
	}()
	// Again: a long run lies between the check and this.
	if err := errors.Join(mayReplace(file), mayReplaceSignature(file+SignatureSuffix, key != nil)); err != nil {
		return err
	}
	type written struct{ temp, name string }
	var all []written
	defer func() {
		for _, w := range all {
			_ = os.Remove(w.temp) // gone under that name when all went well
		}
	}()
	add := func(name string, data []byte) error {
		temp, err := s.writeTemp(filepath.Dir(file), data)
		if temp != "" {
			all = append(all, written{temp, name})
		}
		return err
	}
	if key != nil {
		sig, err := Sign(key, data)
		if err != nil {
			return err
		}
		if err := add(file+SignatureSuffix, sig); err != nil {
			return err
		}
	}
	if err := add(file, data); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return bare(err)
	}
	defer dir.Close()
	for _, w := range all {
		if err := s.step("rename", func() error { return os.Rename(w.temp, w.name) }); err != nil {
			return err
		}
		// The signature's name must be on the medium before that of the manifest.
		if err := s.step("sync directory", dir.Sync); err != nil {
			return err
		}
	}
	return nil
}

// writeTemp writes a file under a name of its own, down to the medium. The name is returned where a file is left.
func (s store) writeTemp(dir string, data []byte) (name string, err error) {
	var f *os.File
	if err := s.step("create", func() (err error) { f, err = os.CreateTemp(dir, tempPattern); return err }); err != nil {
		return "", err
	}
	err = s.step("write", func() error { _, err := f.Write(data); return err })
	if err == nil {
		err = s.step("chmod", func() error { return f.Chmod(0o644) })
	}
	if err == nil {
		// The new name must not lead to a file whose content is still in the cache.
		err = s.step("sync file", f.Sync)
	}
	if cerr := f.Close(); err == nil {
		err = bare(cerr)
	}
	return f.Name(), err
}
