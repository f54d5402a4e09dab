package replicate

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"strings"
	"testing"
	"time"

	"espmirror/fixtures"
)

// wordsSet is a set file in which each member has a text for root.
func wordsSet(texts ...string) string {
	set := ""
	for i, text := range texts {
		guid := []string{guidA, guidB, guidC}[i]
		set += "member " + guid + "\n"
		if text != "" {
			set += "replace root " + guid + " " + text + "\n"
		}
	}
	return set
}

func wordsTree(set, root, more string) map[string]string {
	return withFiles(map[string]string{
		"loader/esp-sync":        set,
		"loader/entries/1.conf":  "title one\noptions " + root + " rw quiet" + more + "\n",
		"loader/entries/no.conf": "title none of the words\n",
		"EFI/Linux/u.efi":        fixtures.Program(root), // not a loader entry: stays as it is
	})
}

// TestWords takes entries from member to member: each keeps its own text, whoever is the source.
func TestWords(t *testing.T) {
	for name, roots := range map[string][3]string{
		"of one length":    {"root=UUID=aaaa", "root=UUID=bbbb", "root=UUID=cccc"},
		"of other lengths": {"root=UUID=a", "root=/dev/disk/by-partuuid/" + strings.Repeat("b", 700), "root=UUID=cccc"},
	} {
		t.Run(name, func(t *testing.T) {
			ms := newMembers(t, geometries[0], nil, "a", "b", "c")
			a, b, c := ms[0], ms[1], ms[2]
			set := wordsSet(roots[0], roots[1], roots[2])
			want := func(more string) {
				t.Helper()
				for i, m := range ms {
					tree := wordsTree(set, roots[i], more)
					tree["EFI/Linux/u.efi"] = fixtures.Program(roots[0])
					judge(t, m.dev, 2, tree)
				}
			}
			same := func(from *aMember, to ...*aMember) {
				t.Helper()
				res, err := from.sync(t, Options{}, to...)
				expectResults(t, "again", res, err, InSync, InSync)
				res, err = from.verify(t, Options{}, to...)
				expectResults(t, "verify", res, err, InSync, InSync)
			}
			a.write(t, wordsTree(set, roots[0], ""))
			res, err := a.sync(t, Options{}, b, c)
			expectResults(t, "first", res, err, Synced, Synced)
			want("")
			for _, from := range [][]*aMember{{a, b, c}, {b, a, c}, {c, a, b}} {
				same(from[0], from[1:]...)
			}
			if st := a.state(t); st.Generation != 1 {
				t.Errorf("generation %d", st.Generation)
			}
			// A change comes from b, and goes on from there.
			b.edit(t, map[string]*string{"loader/entries/1.conf": ptr(wordsTree(set, roots[1], " splash")["loader/entries/1.conf"])})
			res, err = b.sync(t, Options{}, a, c)
			expectResults(t, "from b", res, err, Synced, Synced)
			want(" splash")
			same(a, b, c)
			same(c, b, a)
			if x, y, z := a.state(t), b.state(t), c.state(t); !x.same(y) || !y.same(z) || x.Generation != 2 {
				t.Errorf("%+v %+v %+v", x, y, z)
			}
			// Nothing but somebody's own root changes hands: that is a change.
			c.edit(t, map[string]*string{"loader/entries/1.conf": ptr(wordsTree(set, roots[1], " splash")["loader/entries/1.conf"])})
			res, err = a.sync(t, Options{}, b, c)
			expectResults(t, "foreign root", res, err, InSync, ErrStaleSource)
			c.edit(t, map[string]*string{"loader/entries/1.conf": ptr(wordsTree(set, roots[2], " splash")["loader/entries/1.conf"])})
			same(a, b, c)
			// The texts change: a new disk behind b.
			roots[1] = "root=LABEL=new"
			set = wordsSet(roots[0], roots[1], roots[2])
			a.edit(t, map[string]*string{"loader/esp-sync": ptr(set)})
			res, err = a.sync(t, Options{}, b, c)
			expectResults(t, "other texts", res, err, Synced, Synced)
			want(" splash")
			same(b, a, c)
			for _, m := range ms {
				fsck(t, m.dev)
			}
		})
	}
}

// TestWordsRefused has targets for which an entry cannot be written, beside one for which it can.
func TestWordsRefused(t *testing.T) {
	ms := newMembers(t, geometries[0], nil, "a", "b", "c")
	a, b, c := ms[0], ms[1], ms[2]
	a.write(t, wordsTree(wordsSet("root=UUID=aaaa", "", "root=UUID=cccc"), "root=UUID=aaaa", ""))
	res, err := a.sync(t, Options{}, b, c)
	expectResults(t, "incomplete", res, err, ErrRefused, Synced)
	if len(b.files(t)) > 0 || !strings.Contains(res[0].Err.Error(), "no text for root") {
		t.Error(b.files(t), res[0].Err)
	}
	// The source itself has none.
	res, err = b.sync(t, Options{}, a)
	if err == nil {
		t.Error("an empty source was replicated", res)
	}
	// An entry that names the other's text by itself.
	set := wordsSet("root=UUID=aaaa", "root=UUID=bbbb", "root=UUID=cccc")
	tree := wordsTree(set, "root=UUID=aaaa", "")
	tree["loader/entries/2.conf"] = "title the other disk\noptions root=UUID=bbbb\n"
	a.write(t, tree)
	res, err = a.sync(t, Options{}, b, c)
	expectResults(t, "not faithful", res, err, ErrRefused, Synced)
	if have := c.files(t)["loader/entries/2.conf"]; have != tree["loader/entries/2.conf"] {
		t.Errorf("%q", have)
	}
	// An entry that is not read as one is copied as it is; one that would become too long to be read again is refused.
	delete(tree, "loader/entries/2.conf")
	long := strings.Repeat("#", maxEntryFile)
	tree["loader/entries/big.conf"] = "options root=UUID=aaaa\n" + long
	a.write(t, tree)
	res, err = a.sync(t, Options{}, b, c)
	expectResults(t, "big", res, err, Synced, Synced)
	if have := b.files(t)["loader/entries/big.conf"]; have != tree["loader/entries/big.conf"] {
		t.Error("an entry too big to be read was changed")
	}
	res, err = b.sync(t, Options{}, a, c)
	expectResults(t, "big, back", res, err, InSync, InSync)
	delete(tree, "loader/entries/big.conf")
	tree["loader/esp-sync"] = wordsSet("root=UUID=aaaa", "root=UUID=bbbb", "root=UUID=a-long-one-of-another-length")
	tree["loader/entries/grows.conf"] = "options root=UUID=aaaa\n" + long[:maxEntryFile-30]
	a.write(t, tree)
	res, err = a.sync(t, Options{}, b, c)
	expectResults(t, "grows too big", res, err, Synced, ErrRefused)
}

// TestWordsNoSet has a set file without words, and one on one side only.
func TestWordsNoSet(t *testing.T) {
	ms := newMembers(t, geometries[0], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, wordsTree(wordsSet("", ""), "root=UUID=aaaa", ""))
	res, err := a.sync(t, Options{}, b)
	expectResults(t, "no words", res, err, Synced)
	judge(t, b.dev, 2, wordsTree(wordsSet("", ""), "root=UUID=aaaa", ""))
	// Words come: b's own text was a's until now, which is no change of b's.
	now := wordsTree(wordsSet("root=UUID=aaaa", "root=UUID=bbbb"), "root=UUID=aaaa", "")
	a.edit(t, map[string]*string{"loader/esp-sync": ptr(now["loader/esp-sync"])})
	res, err = a.sync(t, Options{}, b)
	expectResults(t, "words", res, err, Synced)
	want := maps.Clone(now)
	want["loader/entries/1.conf"] = strings.Replace(want["loader/entries/1.conf"], "aaaa", "bbbb", 1)
	judge(t, b.dev, 2, want)
	// A set file that cannot be read on the target is a change, and does not stop the source.
	b.edit(t, map[string]*string{"loader/esp-sync": ptr("exlude x\n")})
	res, err = a.sync(t, Options{}, b)
	expectResults(t, "damaged set", res, err, ErrStaleSource)
	res, err = b.sync(t, Options{}, a)
	if err == nil || !strings.Contains(fmt.Sprint(err), "cannot read the replica set file") {
		t.Error(res, err)
	}
}

// A word that stands often in an entry, and a long text for it.
func TestWordsOften(t *testing.T) {
	set := func(n int) string {
		return "member " + guidA + "\nmember " + guidB + "\nreplace n " + guidA + " a\nreplace n " + guidB + " " + strings.Repeat("b", n) + "\n"
	}
	if _, err := ParseSet("s", []byte(set(maxText+1))); !errors.Is(err, ErrSet) || !strings.Contains(err.Error(), "line 4: ") {
		t.Errorf("a text of more than %d bytes: %v", maxText, err)
	}
	ms := newMembers(t, geometries[2], nil, "a", "b")
	a, b := ms[0], ms[1]
	a.write(t, withFiles(map[string]string{
		"loader/entries/x.conf": "title x\nlinux /EFI/BOOT/BOOTX64.EFI\noptions " + strings.Repeat("a ", 32_000),
		"loader/esp-sync":       set(maxText),
	}))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	res, err := a.sync(t, Options{}, b)
	runtime.ReadMemStats(&after)
	expectResults(t, "too long", res, err, ErrRefused)
	if !strings.Contains(res[0].Err.Error(), "more than 65536 bytes") {
		t.Error(res[0].Err)
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 20<<20 {
		t.Errorf("an entry of 64 KB and a text of 4 KB took %d MB: %v", used>>20, res)
	}
}

// A target's own esp-sync with long names: what is hashed of its entries explodes.
func TestCanonicalLongNames(t *testing.T) {
	text := []byte("options " + strings.Repeat("a ", maxEntryFile/2))
	set := func(n int) (*Set, error) {
		return ParseSet("s", []byte("member "+guidA+"\nreplace "+strings.Repeat("n", n)+" "+guidA+" a\n"))
	}
	if _, err := set(maxName + 1); !errors.Is(err, ErrSet) || !strings.Contains(err.Error(), "line 2: ") {
		t.Errorf("a name of more than %d bytes: %v", maxName, err)
	}
	s, err := set(maxName)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(Canonical(text, s.Texts(guidA))); n > 4<<20 {
		t.Errorf("%d bytes become %d MB", len(text), n>>20)
	}
}

// Many texts of one member, and entries without words: the time to look for them.
func TestManyTexts(t *testing.T) {
	file := "member " + guidA + "\n"
	for i := 0; len(file) < MaxSetSize-80; i++ {
		file += fmt.Sprintf("replace n%d %s t%04d\n", i, guidA, i)
	}
	set, err := ParseSet("s", []byte(file))
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{" ", "a ", "t0001x ", "t"} {
		text := bytes.Repeat([]byte(word), maxEntryFile/len(word))
		start := time.Now()
		Canonical(text, set.Texts(guidA))
		if d := time.Since(start); d > 100*time.Millisecond {
			t.Errorf("one entry of %q takes %v", word, d)
		}
	}
}
