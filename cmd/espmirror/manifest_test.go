package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/replicate"
	"espmirror/replicate/manifest"
)

// twins makes the folder images with one.img, which has an ESP and an XBOOTLDR partition, two.img, a bare volume, and
// primary.img, from which both were synced; m.json states them.
func twins(t *testing.T) *bench {
	t.Helper()
	b := newBench(t)
	b.writes = true
	if err := os.Mkdir("images", 0o755); err != nil {
		t.Fatal(err)
	}
	boot := fixtures.TreeSpec{"loader/entries/x.conf": fixtures.Text("title x\nlinux /x/vmlinuz\n"), "x/vmlinuz": fixtures.Text("MZ kernel x")}
	pair := func(file string, n int, tree, boot fixtures.TreeSpec) {
		makeFixture(t, fixtures.DiskSpec{Size: 8 << 20, GUID: "0a0a0a0a-0000-4000-8000-00000000000" + string(rune('0'+n)),
			Parts: []fixtures.PartSpec{esp(n, tree), xbootldr(n+4, boot)}}, file)
	}
	pair("primary.img", 1, bootTree, boot)
	pair("images/one.img", 2, emptyTree, nil)
	makeFixture(t, fixtures.VolumeSpec{FAT: 12, Size: 2 << 20, Serial: 0x2222BBBB, Label: "SECOND"}, "images/two.img")
	makeFixture(t, fixtures.VolumeSpec{FAT: 12, Size: 2 << 20, Serial: 0x1111BBBB, Label: "PLAIN", Tree: bootTree}, "plain.img")
	signingKeys(t)
	return b
}

func signingKeys(t *testing.T) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, der := range map[string]func() ([]byte, error){
		"PRIVATE KEY": func() ([]byte, error) { return x509.MarshalPKCS8PrivateKey(key) },
		"PUBLIC KEY":  func() ([]byte, error) { return x509.MarshalPKIXPublicKey(pub) },
	} {
		data, err := der()
		if err == nil {
			file := map[string]string{"PRIVATE KEY": "key.pem", "PUBLIC KEY": "pub.pem"}[name]
			err = os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: name, Bytes: data}), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

var toTwins = []string{"--primary", "primary.img", "--target", "images/one.img", "--target", "images/two.img"}

// loadManifest reads a manifest that a command wrote, against the schema too.
func loadManifest(t *testing.T, data []byte) *manifest.Manifest {
	t.Helper()
	m, err := manifest.Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err == nil {
		err = loadSchema(t, "manifest").Validate(doc)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestSyncManifest(t *testing.T) {
	b := twins(t)
	b.run("sync", "--primary", "plain.img", "--target", "images/two.img", "--select", "/", "--manifest", "two.json").want(0).has("the manifest is written", "two.json")
	m := loadManifest(t, readFile(t, "two.json"))
	if len(m.Images) != 1 || m.Images[0].Name != "two.img" || m.Images[0].Volumes[0].Serial != "2222-BBBB" || m.Images[0].Volumes[0].Partition != 0 {
		t.Errorf("got %+v", m.Images)
	}
	b.run("sync", "--primary", "primary.img", "--target", "images/one.img", "--manifest", "m.json", "--sign", "key.pem").want(0)
	first := readFile(t, "m.json")
	m = loadManifest(t, first)
	if len(m.Images) != 1 || len(m.Images[0].Volumes) != 2 || m.Images[0].Volumes[1].Type != "XBOOTLDR" || m.Images[0].DiskGUID != "0a0a0a0a-0000-4000-8000-000000000002" {
		t.Errorf("got %+v", m.Images)
	}
	compareGolden(t, "manifest", string(first))
	if _, err := exec.LookPath("openssl"); err == nil {
		tool(t, "openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "pub.pem", "-rawin", "-in", "m.json", "-sigfile", "m.json.sig")
	}
	// The same again, over the old one and to standard output: the same bytes, and nothing beside them.
	b.run("sync", "--primary", "primary.img", "--target", "images/one.img", "--manifest", "m.json", "--sign", "key.pem").want(0)
	if r := b.run("sync", "--primary", "primary.img", "--target", "images/one.img", "--manifest", "-").want(0); r.stdout != string(first) || !bytes.Equal(readFile(t, "m.json"), first) {
		t.Errorf("two runs differ:\n%s", r.stdout)
	}
	// A dry run writes none; and a volume of a disk is stated by itself.
	b.run("sync", "-n", "--primary", "primary.img", "--target", "images/one.img", "--manifest", "none.json").want(0)
	b.run("sync", "--primary", "plain.img", "--target", "images/one.img@@p1", "--manifest", "part.json").want(0)
	m = loadManifest(t, readFile(t, "part.json"))
	if m.Images[0].Name != "one.img@@p1" || m.Images[0].Size != 0 || m.Images[0].DiskGUID == "" || len(m.Images[0].Volumes) != 1 {
		t.Errorf("got %+v", m.Images)
	}
	b.run("verify", "--manifest", "part.json", "images/one.img@@p1").want(0)
	b.run("verify", "--manifest", "part.json", "images/one.img").want(0)
	b.run("verify", "--manifest", "part.json", "images/one.img@@p2").want(exitRefused).has("has no entry for it")
	// Something was not done: no manifest, and it is said.
	b.run("sync", "--primary", "primary.img", "--target", "images/one.img", "--target", "missing.img", "--manifest", "none.json").want(exitPartial).has("no manifest was written")
	if _, err := os.Stat("none.json"); err == nil {
		t.Error("a manifest was written")
	}
}

func TestSyncManifestRefuses(t *testing.T) {
	b := twins(t)
	if err := os.WriteFile("precious", []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("old.json.sig", make([]byte, 64), 0o644); err != nil {
		t.Fatal(err)
	}
	b.writes = false // none of these writes anything
	before := hashesOf(t, "images")
	for _, c := range []struct {
		args string
		code int
		want string
	}{
		{"--sign key.pem", exitUsage, "--sign signs a manifest"},
		{"--manifest - --sign key.pem", exitUsage, "standard output has no name"},
		{"--manifest - --json=short", exitUsage, "both go to standard output"},
		{"--manifest a.json --manifest b.json", exitUsage, "given twice"},
		{"--manifest m.json --sign pub.pem", exitFailed, "it is a public key"},
		{"--manifest m.json --sign missing.pem", exitFailed, "cannot read key missing.pem: no such file"},
		{"--manifest precious", exitRefused, "is not a manifest"},
		{"--manifest old.json", exitRefused, "would not be that of the new manifest"},
		{"--manifest missing/m.json", exitFailed, "no such file"},
		{"--manifest m.json --target primary/two.img", exitRefused, "has the same name there, two.img"},
	} {
		args := append([]string{"sync"}, toTwins...)
		if c.args == "--manifest m.json --target primary/two.img" {
			if err := errors.Join(os.Mkdir("primary", 0o755), os.WriteFile("primary/two.img", readFile(t, "images/two.img"), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		b.run(append(args, strings.Fields(c.args)...)...).want(c.code).has(c.want)
	}
	if after := hashesOf(t, "images"); after != before {
		t.Error("something was written")
	}
	if string(readFile(t, "precious")) != "precious" {
		t.Error("a foreign file was replaced")
	}
}

// hashesOf is the content of a folder.
func hashesOf(t *testing.T, dir string) string {
	t.Helper()
	names, err := filepath.Glob(dir + "/*")
	if err != nil {
		t.Fatal(err)
	}
	var sb strings.Builder
	for _, name := range names {
		sb.Write(readFile(t, name))
	}
	return sb.String()
}

// TestManifestFaults has targets that cannot be read once they are done.
func TestManifestFaults(t *testing.T) {
	b := twins(t)
	b.run("sync", "--primary", "primary.img", "--target", "images/one.img", "--manifest", "m.json").want(0)
	b.app.device = func(d blockdev.Device) blockdev.Device {
		vol, err := fatdriver.Open(d)
		if err != nil {
			t.Fatal(err)
		}
		tree, err := vol.Scan()
		if err != nil {
			t.Fatal(err)
		}
		n := tree.Lookup("EFI/BOOT/BOOTX64.EFI")
		if n == nil {
			return d
		}
		g := vol.Geometry()
		at := g.ClusterOff(n.Runs[0].First)
		return blockdev.NewFaulty(d, func(op blockdev.Op) error {
			if op.Kind == blockdev.OpRead && op.Off <= at && at < op.Off+int64(len(op.Data)) {
				return syscall.EIO
			}
			return nil
		})
	}
	fixtures.Count("faults", 3)
	b.run("sync", "--primary", "primary.img", "--target", "images/one.img", "--manifest", "none.json").want(exitFailed).
		has("cannot write manifest none.json: cannot state images/one.img: cannot read images/one.img@@p1: cannot read EFI/BOOT/BOOTX64.EFI: ", "input/output error")
	if _, err := os.Stat("none.json"); err == nil {
		t.Error("a manifest was written")
	}
	b.writes = false
	r := b.run("verify", "--manifest", "m.json", "--json=short", "images/one.img").want(exitPartial)
	v := r.json("verify-manifest")["images"].([]any)[0].(map[string]any)["volumes"].([]any)
	if v[0].(map[string]any)["outcome"] != "failed" || v[1].(map[string]any)["outcome"] != "in sync" {
		t.Errorf("got %v", v)
	}
	b.run("verify", "--manifest", "m.json", "images/one.img").want(exitPartial).has("cannot read EFI/BOOT/BOOTX64.EFI: ", "input/output error")
	// One that goes away is told of for every other one, too.
	inv := &invocation{app: b.app, ctx: context.Background(), system: b.app.system}
	all := inv.stateImages([]string{"primary.img", "images/two.img", "missing.img"}, 2, nil)
	for _, s := range all {
		if s.err == nil && len(s.image.Volumes) == 0 {
			t.Errorf("got %+v", s)
		}
	}
	if !errors.As(all[2].err, new(missing)) && !errors.Is(all[2].err, context.Canceled) {
		t.Error(all[2].err)
	}
}

func TestVerifyManifest(t *testing.T) {
	b := twins(t)
	b.run("sync", "--primary", "primary.img", "--target", "images/one.img").want(0)
	b.run("sync", "--primary", "plain.img", "--target", "images/two.img", "--select", "/").want(0)
	inv := &invocation{app: b.app, ctx: context.Background(), system: b.app.system, json: "off", log: newLogger(&b.err, 0)}
	key, err := manifest.ReadPrivateKey("key.pem")
	if err != nil {
		t.Fatal(err)
	}
	out := &manifestOutput{inv: inv, file: "images/m.json", key: key}
	if err := out.write([]string{"images/two.img", "images/one.img"}); err != nil {
		t.Fatal(err)
	}
	b.writes = false
	b.run("verify", "--manifest", "images/m.json").want(0).has("has a signature, which is not checked").golden("verify-manifest")
	b.run("verify", "--manifest", "images/m.json", "--verify-key", "pub.pem", "images/one.img").want(0).has("The signature of the manifest is valid.")
	if r := b.run("verify", "-q", "--manifest", "images/m.json", "images/one.img@@p2").want(0); r.stdout+r.stderr != "" {
		t.Errorf("got %s%s", r.stdout, r.stderr)
	}
	// On a disk of another name it is known by its GUID; a name of another image is told of.
	copyTo := func(name string) {
		t.Helper()
		if err := os.WriteFile(name, readFile(t, "images/one.img"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	copyTo("sdb")
	b.run("verify", "--manifest", "images/m.json", "sdb").want(0).has("one.img")
	copyTo("two.img")
	b.run("verify", "--manifest", "images/m.json", "two.img").want(0).has("another image of the manifest than by its name")
	// What lies beside the manifest is compared with its own entry.
	keep := readFile(t, "images/two.img")
	copyTo("images/two.img")
	b.run("verify", "--manifest", "images/m.json").want(exitDiffers).has("disk GUID: 0a0a0a0a-0000-4000-8000-000000000002, not none")
	if err := os.Remove("images/two.img"); err != nil {
		t.Fatal(err)
	}
	b.run("verify", "--manifest", "images/m.json").want(exitPartial).has(`cannot verify images/two.img: cannot find volume "images/two.img"`, "missing")
	b.run("verify", "--manifest", "images/m.json", "--json=short").want(exitPartial).json("verify-manifest")
	if err := os.WriteFile("images/two.img", keep, 0o644); err != nil {
		t.Fatal(err)
	}
	b.run("verify", "--manifest", "images/m.json", "primary.img").want(exitRefused).
		has("has no entry for it", "name primary.img", "disk GUID 0a0a0a0a-0000-4000-8000-000000000001", "hint: the entries are one.img, two.img")
	b.run("verify", "--manifest", "images/m.json", "images/one.img", "missing.img").want(exitPartial)

	for _, c := range []struct{ args, want string }{
		{"--verify-key pub.pem", "--verify-key checks a manifest"},
		{"images/one.img", "no argument is taken"},
		{"--manifest images/m.json --primary primary.img", "--primary has no meaning with --manifest"},
		{"--manifest images/m.json --target images/one.img", "--target has no meaning with --manifest"},
		{"--manifest images/m.json --select /", "--select has no meaning"},
		{"--manifest images/m.json --exclude x", "--exclude has no meaning"},
		{"--manifest -", "a manifest to verify with is a file"},
	} {
		b.run(append([]string{"verify"}, strings.Fields(c.args)...)...).want(exitUsage).has(c.want)
	}

	// The signature is judged before anything else, and then nothing else is said.
	b.run("verify", "--manifest", "images/m.json", "--verify-key", "key.pem").want(exitFailed).has("it is a private key")
	good := readFile(t, "images/m.json")
	put := func(name string, data []byte) {
		t.Helper()
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("images/m.json", bytes.Replace(good, []byte("FAT12"), []byte("FAT99"), 1))
	b.run("verify", "--manifest", "images/m.json", "--verify-key", "pub.pem").want(exitRefused).has("the signature is not valid")
	b.run("verify", "--manifest", "images/m.json").want(exitFailed).has("the manifest cannot be used", "fat_type")
	put("images/m.json", good)
	if err := os.Remove("images/m.json.sig"); err != nil {
		t.Fatal(err)
	}
	b.run("verify", "--manifest", "images/m.json", "--verify-key", "pub.pem").want(exitRefused).has("images/m.json.sig", "no such file")
	if r := b.run("verify", "--manifest", "images/m.json").want(0); strings.Contains(r.stderr, "signature") {
		t.Errorf("got %s", r.stderr)
	}
	b.run("verify", "--manifest", "missing.json").want(exitFailed)
	b.run("verify", "--manifest", "primary.img").want(exitFailed).has("it is not a manifest")
}

// TestVerifyManifestFinds changes one thing after the other, and each is found.
func TestVerifyManifestFinds(t *testing.T) {
	b := twins(t)
	b.run("sync", "--primary", "primary.img", "--target", "images/one.img", "--manifest", "m.json").want(0)
	good := readFile(t, "images/one.img")
	const p1, p2 = 1 << 20, 4 << 20
	change := func(f func(d []byte)) {
		t.Helper()
		d := bytes.Clone(good)
		f(d)
		if err := os.WriteFile("images/one.img", d, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b.writes = false
	verify := func(code int, texts ...string) *result {
		t.Helper()
		return b.run("verify", "--manifest", "m.json", "images/one.img").want(code).has(texts...)
	}
	verify(0)
	change(func(d []byte) { d[p1+39] ^= 1 }) // BS_VolID of FAT12
	verify(exitDiffers, "serial number: 1000-0003, not 1000-0002")
	change(func(d []byte) { d[p2+39] ^= 1 })
	verify(exitDiffers, "images/one.img@@p2", "serial number")
	for path, c := range bootTree {
		content := make([]byte, 0, c.Size)
		content = append(content, c.Head...)
		change(func(d []byte) {
			at := bytes.Index(d[p1:], content)
			if at < 0 {
				t.Fatalf("%s is not there in one piece", path)
			}
			d[p1+at+len(content)-1] ^= 1
		})
		if r := verify(exitDiffers, "differs  "+path); !strings.Contains(r.stdout, "one.img@@p1: differs, 1 difference\n") {
			t.Errorf("got %s", r.stdout)
		}
	}
	change(func([]byte) {})
	for _, c := range []struct {
		args string
		want string
	}{
		{"--disk-guid=0a0a0a0a-0000-4000-8000-0000000000ff", "disk GUID: 0a0a0a0a-0000-4000-8000-0000000000ff, not 0a0a0a0a-0000-4000-8000-000000000002"},
		{"--partition-guid=1:6f0c0002-0000-4000-8000-0000000000ff", "partition GUID: 6f0c0002-0000-4000-8000-0000000000ff, not " + guidOf(2)},
		{"--change-name=1:other", "partition label: other, not EFI system"},
		{"--typecode=2:ef00", "partition type: ESP, not XBOOTLDR"},
		{"--delete=2", "partition 2: none, not XBOOTLDR"},
		{"--transpose=1:2", "partition number: 2, not 1"},
	} {
		change(func([]byte) {})
		tool(t, "sgdisk", c.args, "images/one.img")
		verify(exitDiffers, c.want)
	}
	for _, c := range []struct {
		at   int
		want string
	}{
		{0x1fe, "there is no protective MBR"}, {512 + 20, "the primary table is damaged"}, {2*512 + 60, "the primary table is damaged"},
		{len(good) - 512 + 20, "the backup table is damaged"},
	} {
		change(func(d []byte) { d[c.at] ^= 1 })
		verify(exitDiffers, "partition table: "+c.want, ", not sound")
	}
	change(func([]byte) {})
	tool(t, "mattrib", "-i", "images/one.img@@1M", "+r", "::loader/loader.conf") // attributes are not stated
	verify(0)
	tool(t, "mmd", "-i", "images/one.img@@1M", "::new")
	tool(t, "mdel", "-i", "images/one.img@@1M", "::loader/loader.conf")
	tool(t, "mlabel", "-i", "images/one.img@@1M", "::OTHER")
	b.run("verify", "--manifest", "m.json", "images/one.img").want(exitDiffers).has("missing  loader/loader.conf", "extra    new/", "label: OTHER, not ESP2").golden("verify-manifest-differs")
	b.run("verify", "--manifest", "m.json", "--json=pretty", "images/one.img").want(exitDiffers).json("verify-manifest")
	// What is the volume's own may change.
	change(func([]byte) {})
	tool(t, "mcopy", "-i", "images/one.img@@1M", "m.json", "::loader/random-seed")
	verify(0)
	// A volume that is damaged, and one that was cut.
	change(func(d []byte) { clear(d[p1 : p1+512]) })
	verify(exitRefused, "hint: run `espmirror check images/one.img@@p1`")
	change(func(d []byte) { d[p1+0x14] += 8 }) // BPB_TotSec16
	verify(exitRefused, "the volume claims")
	change(func([]byte) {})
	if err := os.Truncate("images/one.img", int64(len(good))+1<<20); err != nil {
		t.Fatal(err)
	}
	verify(exitDiffers, "size: 9437184, not 8388608")
}

// TestVerifyManifestPending: what an interrupted run left is no content to compare with, nor to state.
func TestVerifyManifestPending(t *testing.T) {
	r := newRig(t)
	r.disk("sda", esp(1, bootTree))
	r.disk("sdb", esp(2, emptyTree))
	r.writes = true
	primary, target := r.node("sda1"), r.node("sdb1")
	r.run("sync", "--primary", primary, "--target", target, "--manifest", "m.json").want(0)
	r.copyIn("sda1", "loader/loader.conf", "timeout 7\n")
	r.interrupt("--primary", primary, "--target", target)
	r.run("verify", "--manifest", "m.json", target).want(exitRecover).has("needs recovery", "hint: run `espmirror recover "+target)
	inv := &invocation{app: r.app, ctx: context.Background(), system: r.app.system, log: newLogger(&r.err, 0)}
	err := (&manifestOutput{inv: inv, file: "new.json"}).write([]string{target})
	if err == nil || !strings.Contains(err.Error(), replicate.ErrNeedsRecovery.Error()) || exitCode(err) != exitFailed || hintOf(err) == "" {
		t.Error(err)
	}
}

// TestVerifyManifestDisk has a block device to which an image was written, larger than that.
func TestVerifyManifestDisk(t *testing.T) {
	b := twins(t)
	b.run("sync", "--primary", "primary.img", "--target", "images/one.img", "--manifest", "m.json").want(0)
	data := append(readFile(t, "images/one.img"), make([]byte, 4<<20)...)
	if err := os.WriteFile("disk", data, 0o644); err != nil {
		t.Fatal(err)
	}
	node := loop(t, b, "disk")
	b.writes = false
	b.run("verify", "--manifest", "m.json", node).want(0).has("one.img")
	b.run("verify", "--manifest", "m.json", node+"@@p2").want(0)
	// One that is in use may have in memory what is not on it.
	upper := loop(t, b, node)
	b.run("verify", "--manifest", "m.json", node).want(exitRefused).has("attached to "+filepath.Base(upper), "busy")
}
