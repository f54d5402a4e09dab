package mutants

// Patch is a change of one file of the product.
type Patch struct {
	File string
	At   string // occurs exactly once in the file; Old begins within, or soon after it
	Old  string // what is replaced: its first occurrence from the beginning of At on; "" inserts behind At
	New  string // holds the original as well, and selects by mutant("name")
}

// Mutant is the product with one protection taken out.
type Mutant struct {
	Name    string
	Breaks  string // what it takes out, in words
	First   string // a word in the names of the scenarios that are tried first; all others follow
	Patches []Patch
	// Redundant says why nothing can tell this mutant from the product, where that is so. The test fails when it is
	// killed after all, as the reason is wrong then.
	Redundant string
}

const (
	txGo       = "fatdriver/tx.go"
	fatWriteGo = "fatdriver/fatwrite.go"
	fatGo      = "fatdriver/fat.go"
	allocGo    = "fatdriver/alloc.go"
	planGo     = "fatdriver/plan.go"
	extendGo   = "fatdriver/extend.go"
	mendGo     = "fatdriver/recover.go"
	logGo      = "journal/log.go"
	headerGo   = "journal/header.go"
	decideGo   = "journal/decide.go"
	buildGo    = "replicate/build.go"
	journalGo  = "replicate/log.go"
	stepsGo    = "replicate/plan.go"
	recoverGo  = "replicate/recover.go"
	syncGo     = "replicate/sync.go"
	latchGo    = "replicate/latch.go"
	stageGo    = "replicate/stage.go"
)

// common are the patches that belong to no single mutant. unchecked() is set in the second run of a mutant that the
// product's own checks have killed: what do they protect from?
var common = []Patch{
	{planGo, "if err := p.assert()", "err != nil", "err != nil && !unchecked()"},
	{txGo, "if !bytes.Equal(have, want) {", "!bytes.Equal(have, want)", `!bytes.Equal(have, want) && !unchecked() && !(mutant("old commit sector not checked") && when == "before the commit")`},
	{buildGo, "if r.opt.NoReadBack {", "r.opt.NoReadBack", "r.opt.NoReadBack || unchecked()"},
}

// noFlush takes out a call of a flush.
func noFlush(name, file, at, flush string) []Patch {
	return []Patch{{file, at, flush, `skip("` + name + `", ` + flush[:len(flush)-2] + `)`}}
}

// noStep takes out a step of a list.
func noStep(name, file, at, step string) []Patch {
	return []Patch{{file, at, step + ",", `func() error { return skip("` + name + `", ` + step + `) },`}}
}

// begin makes a function return at once.
func begin(name, file, function, result string) []Patch {
	return []Patch{{file, function, "", "\nif mutant(\"" + name + "\") {\nreturn " + result + "\n}\n"}}
}

// and adds a condition to one that the file has.
func and(name, file, cond string) []Patch {
	return []Patch{{file, cond, cond, "(" + cond + `) && !mutant("` + name + `")`}}
}

// Table lists the mutants.
var Table = []Mutant{
	// Barriers of a transaction.
	{Name: "no J", Breaks: "the header that says Prepared is not flushed",
		Patches: []Patch{{logGo, "// The record must be stable before the caller writes what it speaks of.", "true", `!mutant("no J")`}}},
	{Name: "no B1", Breaks: "no flush between build and commit",
		Patches: noStep("no B1", buildGo, "// B1: the new tree must be on the medium", "tx.Flush")},
	{Name: "no B2", Breaks: "no flush between commit and free",
		Patches: noFlush("no B2", buildGo, "// B2: the old tree's clusters may be freed", "tx.Flush()")},
	{Name: "no B3", Breaks: "no flush between free and the closing of the record",
		Patches: noFlush("no B3", buildGo, "// B3: the record may be closed only", "tx.Flush()")},
	{Name: "no B4", Breaks: "no flush at the end of a run",
		Patches: noFlush("no B4", buildGo, "// B4: the run is over when", "tx.Flush()")},
	{Name: "no flush of Advance", Breaks: "the header that says Committing is not flushed", First: "kernel",
		Patches: []Patch{{logGo, `h.State, h.Index, h.Digest = Committing, uint32(i), digest`, "true", `!mutant("no flush of Advance")`}}},
	{Name: "spool behind the barrier", Breaks: "a flush leaves behind what was gathered for writing", First: "border",
		Patches: []Patch{{txGo, "func (tx *Tx) Flush() error {", "tx.Sync()", `skip("spool behind the barrier", tx.Sync)`}}},
	{Name: "error of a flush ignored", Breaks: "a flush that fails counts as done",
		Patches: []Patch{{txGo, "return tx.v.dev.Flush()", "return tx.v.dev.Flush()", "err := tx.v.dev.Flush()\nif mutant(\"error of a flush ignored\") {\nreturn nil\n}\nreturn err"}}},
	{Name: "goes on after a failed flush", Breaks: "the run rolls back through a cache that lies",
		Patches: []Patch{
			{buildGo, "if !committing && ", "!committing && ", `mutant("goes on after a failed flush") || !committing && `},
			{latchGo, "func (l *latch) Flush() error {", "l.failed.Load()", `l.failed.Load() && !mutant("goes on after a failed flush")`},
			{latchGo, "func (l *latch) WriteAt(", "l.failed.Load()", `l.failed.Load() && !mutant("goes on after a failed flush")`}}},

	// Creation of the journal, and directories that grow.
	{Name: "no flush of the stamps", Breaks: "the clusters of a new journal are taken before its content is on the medium", First: "no journal",
		Patches: noStep("no flush of the stamps", journalGo, "// The stamps must be on the medium", "tx.Flush")},
	{Name: "no B1 of the journal", Breaks: "the journal's directory entry is not ordered behind its clusters", First: "no journal",
		Patches: noStep("no B1 of the journal", journalGo, "// The file must be whole before its directory entry is.", "tx.Flush")},
	{Name: "one stamp", Breaks: "only the first cluster of a new journal says whose it is", First: "no journal",
		Patches: []Patch{{journalGo, "for at := g.ClusterSize; at < len(content);", "at < len(content)", `at < len(content) && !mutant("one stamp")`}}},
	{Name: "stamps unknown", Breaks: "recovery does not know the leftovers of a creation", First: "no journal",
		Patches: []Patch{{recoverGo, "free = append(free, stamped, blank)", "stamped, blank", `unless("stamps unknown", stamped), unless("blank clusters unknown", blank)`}}},
	{Name: "blank clusters unknown", Breaks: "recovery does not know the leftovers of a directory that grew", First: "no slot"},
	{Name: "no flush of the zeros", Breaks: "without a journal, new directory clusters are taken before they hold zeros", First: "no slot",
		Patches: []Patch{{journalGo, "// Where no record names the cluster", "return tx.Flush()", `return skip("no flush of the zeros", tx.Flush)`}}},
	{Name: "no B1 of a growing directory", Breaks: "a directory leads to its new clusters before they hold zeros", First: "no slot",
		Patches: noStep("no B1 of a growing directory", journalGo, "// B1: what is new must be on the medium", "tx.Flush")},
	{Name: "new directory clusters not zeroed", Breaks: "a directory grows by what lay there", First: "no slot",
		Patches: noStep("new directory clusters not zeroed", journalGo, "func (r *run) carryOut(", "tx.WriteDirs")},
	{Name: "directory grows without a record", Breaks: "no intent before a directory grows", First: "full",
		Patches: []Patch{{journalGo, "dir *fatdriver.Node, clusters int64) error {", "", "\nif mutant(\"directory grows without a record\") {\nlog = nil\n}"}}},
	{Name: "directory grows in copy 0 only", Breaks: "FAT copy 1 does not get the link to new directory clusters", First: "full",
		Patches: []Patch{{extendGo, "for n := 0; n < g.NumFATs; n++ {", "n < g.NumFATs", `n < g.NumFATs && !(n > 0 && mutant("directory grows in copy 0 only"))`}}},

	// Order of a transaction.
	{Name: "commit before build", Breaks: "the commit comes first", Patches: []Patch{
		{buildGo, "func() error { return r.receive(f, tx) },", "", `
		func() error {
			if !mutant("commit before build") {
				return nil
			}
			log, err := r.journalOf(s)
			if err != nil {
				return err
			}
			committing = true
			return r.commitAll(s, s.plan, tx, log)
		},`},
		{buildGo, "if err := r.commitAll(s, s.plan, tx, log); err != nil {", "err != nil", `err != nil && !mutant("commit before build")`}}},
	{Name: "free before commit", Breaks: "the old clusters are free before the commit", Patches: []Patch{
		{buildGo, "committing = true\n", "", `
		if mutant("free before commit") {
			if err := inOrder(tx.Free, tx.Flush); err != nil {
				return err
			}
		}
		if mutant("intent after the build") {
			if r.prepare(s); s.res.Err != nil {
				return s.res.Err
			}
			if log, err = r.journalOf(s); err != nil {
				return err
			}
		}
		`}}},
	{Name: "intent after the build", Breaks: "the record is written between build and commit", Patches: []Patch{
		{syncGo, "r.each(r.prepare)", "r.each(r.prepare)", "if !mutant(\"intent after the build\") {\nr.each(r.prepare)\n}"}}},
	{Name: "record closed before free", Breaks: "the record is closed, flushed, and then the old clusters become free", Patches: []Patch{
		{buildGo, "func closeTx(tx *fatdriver.Tx, log *journal.Log) error {", "", "\nif mutant(\"record closed before free\") && log != nil {\nif err := inOrder(log.Done, tx.Flush); err != nil {\nreturn err\n}\n}"}}},
	{Name: "commits without Advance", Breaks: "several commits, and the record does not say how far they came", First: "kernel", Patches: []Patch{
		{buildGo, "if log != nil && len(plan.Blocks) > 1 {", "log != nil", `!mutant("commits without Advance") && !mutant("Advance after its commit") && log != nil`},
		{buildGo, "if err := tx.Committed(i); err != nil {\n\t\t\treturn err\n\t\t}", "", `
		if mutant("Advance after its commit") && log != nil && len(plan.Blocks) > 1 {
			if err := log.Advance(i, tx.Digest()); err != nil {
				return err
			}
		}`}}},
	{Name: "Advance after its commit", Breaks: "the record says that a commit is coming when it is over", First: "kernel"},
	{Name: "commits in reverse", Breaks: "blocks are committed from the last to the first", First: "kernel", Patches: []Patch{
		{buildGo, "for i, b := range plan.Blocks {", "", "\nif mutant(\"commits in reverse\") {\ni = len(plan.Blocks) - 1 - i\n}"}}},
	{Name: "entries before payload", Breaks: "loader entries switch before what they name is there", First: "kernel added", Patches: []Patch{
		{stepsGo, "if len(bound) == 0 || len(entries) == 0 {", "", `
		if mutant("entries before payload") {
			return s.tree.NewPlan([]fatdriver.Step{anchors(entries), append(anchors(payload), anchors(bound)...)}, r.opt.KeepFree)
		}`}}},
	{Name: "removals before entries", Breaks: "what old loader entries name goes before they do", First: "kernel update", Patches: []Patch{
		{stepsGo, "payload, entries, bound := r.sortPoints(s, points)", "", `
		if mutant("removals before entries") {
			payload, bound = append(payload, bound...), nil
		}`}}},
	{Name: "blocks from the beginning", Breaks: "new entries behind the end marker are written from the marker on", First: "root", Patches: []Patch{
		{planGo, "for at := len(raw) - ss; at >= 0; at -= ss {", "", "\nat := at\nif mutant(\"blocks from the beginning\") {\nat = len(raw) - ss - at\n}"}}},
	{Name: "wakes before its long name", Breaks: "an entry behind the end marker is there before its long name, for Linux", First: "giant", Patches: []Patch{
		{planGo, "b[at] = slotDeleted", "b[at] = slotDeleted", "if !mutant(\"wakes before its long name\") {\nb[at] = slotDeleted\n}"}}},
	{Name: "no zero padding", Breaks: "the rest of a file's last cluster is not written", Patches: []Patch{
		{txGo, "if err := w.raw(make([]byte, w.tx.v.geo.ClusterSize-rest)); err != nil {", "w.raw(make([]byte, w.tx.v.geo.ClusterSize-rest))",
			`skip("no zero padding", func() error { return w.raw(make([]byte, w.tx.v.geo.ClusterSize-rest)) })`}}},
	{Name: "directory without zero tail", Breaks: "a new directory is written up to its last entry", Patches: []Patch{
		{txGo, "if err := tx.write(b[:k], g.ClusterOff(r.First)); err != nil {", "b[:k]", `tail("directory without zero tail", b[:k])`}}},
	{Name: "no end marker behind new entries", Breaks: "what lay behind the end marker becomes visible", First: "joins the root",
		Patches: and("no end marker behind new entries", planGo, "!zero(s)")},
	{Name: "deleted entry keeps its long name", Breaks: "only the short slot of a deleted entry is marked", First: "leave the root", Patches: []Patch{
		{planGo, "for i := at.first; i < at.first+at.n; i++ {", "", "\nif mutant(\"deleted entry keeps its long name\") && i < at.first+at.n-1 {\ncontinue\n}"}}},
	{Name: "forgets ..", Breaks: "`..` of a directory below a shadow names the old parent", Patches: []Patch{
		{planGo, `dot(0, ".", first)`, "", "\nif mutant(\"forgets ..\") && w.Have != nil && w.Have.Parent != nil {\nparent = w.Have.Parent.cluster()\n}\n" +
			"if mutant(\"forgets .\") && near != 0 {\ndot(0, \".\", near)\n}\n" +
			"if mutant(\".. names the root's cluster\") && parent == 0 && g.Type == FAT32 {\nparent = g.RootCluster\n}"}}},
	{Name: "forgets .", Breaks: "`.` of a shadow names the old directory"},
	{Name: ".. names the root's cluster", Breaks: "`..` is not 0 where the parent is FAT32's root", First: "kernel in the root"},
	{Name: "chain too long", Breaks: "a file whose size is a multiple of the cluster gets one cluster more", Patches: []Patch{
		{planGo, "runs, err := pl.a.file((w.Size+cs-1)/cs, w.Contiguous)", "(w.Size+cs-1)/cs", `(w.Size+cs-1)/cs + more("chain too long", w.Size)`}}},
	{Name: "chain in a circle", Breaks: "a chain ends with a link to its beginning", Patches: []Patch{
		{planGo, "next := uint32(entryLast)\n", "", "\nif mutant(\"chain in a circle\") {\nnext = uint32(runs[0].First)\n}\n"}}},
	{Name: "reuses a freed cluster", Breaks: "clusters of the old tree are allocated to the new one (I3)", Patches: []Patch{
		{planGo, "for _, w := range last {\n\t\tif w != nil {\n\t\t\tpl.keepFiles(w)\n\t\t}\n\t}", "", `
	if mutant("reuses a freed cluster") {
		b := newBitmap(g)
		for i := range b {
			b[i] = pl.old[i] &^ pl.keep[i]
		}
		a.setFree(append(b.runs(), a.free...))
		a.at = 0
	}`}}},
	{Name: "frees kept files", Breaks: "the clusters of files that stay are freed with the old tree", Patches: []Patch{
		{planGo, "pl.keep.setRuns(w.Have.Runs)", "pl.keep.setRuns(w.Have.Runs)", "if !mutant(\"frees kept files\") {\npl.keep.setRuns(w.Have.Runs)\n}"}}},
	{Name: "frees nothing", Breaks: "the old tree's clusters stay allocated",
		Patches: begin("frees nothing", txGo, "func (tx *Tx) Free() error {", "nil")},
	{Name: "intermediate shadow stays", Breaks: "a directory that only a step in between uses is not freed", First: "kernel update",
		Patches: and("intermediate shadow stays", planGo, "!final[d]")},
	{Name: "one FAT copy only", Breaks: "FAT copy 1 is not written", Patches: []Patch{
		{fatWriteGo, "for n := 0; n < e.v.geo.NumFATs; n++ {", "n < e.v.geo.NumFATs", `n < e.v.geo.NumFATs && !(n > 0 && mutant("one FAT copy only"))`}}},
	{Name: "straddling cluster allocated", Breaks: "a FAT12 entry that lies in two sectors is used", First: "at a straddling",
		Patches: []Patch{{allocGo, "!v.geo.straddles(next)", "!v.geo.straddles(next)", `!v.geo.straddles(next) || mutant("straddling cluster allocated")`}}},
	{Name: "no flush between halves", Breaks: "both halves of a straddling FAT12 entry are freed in one epoch", First: "straddling",
		Patches: noFlush("no flush between halves", fatWriteGo, "// The other halves must not reach the medium", "v.dev.Flush()")},
	{Name: "wrong half first", Breaks: "of a straddling FAT12 entry the half goes first that leaves an illegal value", First: "straddling", Patches: []Patch{
		{fatWriteGo, "case legal(low):", "return true, true", `return !mutant("wrong half first"), true`}}},
	{Name: "straddling entry freed at once", Breaks: "a straddling FAT12 entry is freed like any other", First: "straddling", Patches: []Patch{
		{fatWriteGo, "if !v.geo.straddles(c) {", "!v.geo.straddles(c)", `!v.geo.straddles(c) || mutant("straddling entry freed at once")`}}},
	{Name: "FAT12 neighbour", Breaks: "the half byte of the neighbour is lost", First: "FAT12", Patches: []Patch{
		{fatGo, "old := le.Uint16(b)\n", "", "\nif mutant(\"FAT12 neighbour\") {\nold = 0\n}\n"}}},
	{Name: "FAT32 top bits", Breaks: "the four reserved bits of a FAT32 entry are lost (I5)", First: "FAT32/512/1 replace", Patches: []Patch{
		{fatGo, "le.PutUint32(b, le.Uint32(b)&0xF0000000|v&0x0FFFFFFF)", "le.PutUint32(b, le.Uint32(b)&0xF0000000|v&0x0FFFFFFF)",
			"le.PutUint32(b, le.Uint32(b)&0xF0000000|v&0x0FFFFFFF)\nif mutant(\"FAT32 top bits\") {\nle.PutUint32(b, v&0x0FFFFFFF)\n}"}}},
	{Name: "free count not made unknown", Breaks: "FSInfo says a wrong number while the run lasts", First: "FAT32", Patches: []Patch{
		{txGo, "return tx.v.setFree(fsiUnknown)", "return", "if mutant(\"free count not made unknown\") {\nreturn nil\n}\nreturn"}}},
	{Name: "free count stays unknown", Breaks: "FSInfo has no number after the run", First: "FAT32",
		Patches: begin("free count stays unknown", txGo, "func (tx *Tx) Finish() error {", "nil")},

	// Reading back.
	{Name: "files not read back", Breaks: "a device that loses file content is not noticed", Patches: and("files not read back", txGo, "sum != f.sum && len(f.Runs) > 0")},
	{Name: "directories not read back", Breaks: "a device that loses directories is not noticed", Patches: and("directories not read back", txGo, "sum != sumOf(d.image)")},
	{Name: "FATs not read back", Breaks: "a device that loses FAT sectors is not noticed", Patches: and("FATs not read back", txGo, "have != want")},
	{Name: "commit not read back", Breaks: "a device that loses the commit is not noticed", Patches: []Patch{
		{txGo, `return tx.expect(i, tx.p.Blocks[i].New, "after the commit")`, "return", "if mutant(\"commit not read back\") {\nreturn nil\n}\nreturn"}}},
	{Name: "old commit sector not checked", Breaks: "a commit sector that another system has changed is overwritten"},

	// The journal.
	{Name: "header before payload", Breaks: "the header is flushed, the record it names is not", Patches: []Patch{
		{logGo, "h.payloadLen, h.payloadSum = uint32(size), sha256.Sum256(b[:size])\n", "", `
	if mutant("header before payload") {
		if err := l.put(h, true); err != nil {
			return err
		}
		_, err := l.dev.WriteAt(b, PayloadOffset)
		return err
	}
	`}}},
	{Name: "header over the one that counts", Breaks: "a header is written over the only valid one", First: "kernel", Patches: []Patch{
		{logGo, "slot := int64(SlotA)\n\tif l.slot == SlotA {", "l.slot == SlotA", `(l.slot == SlotA) != mutant("header over the one that counts")`}}},
	{Name: "sequence stands still", Breaks: "the new header does not win over the old one", Patches: []Patch{
		{logGo, "if h.Seq = max(h.Seq, l.head.Seq+1); ", "; ", "; mutant(\"sequence stands still\") {\nh.Seq = l.head.Seq\n} else if "}}},
	{Name: "header's checksum ignored", Breaks: "a torn header counts", First: "kernel",
		Patches: and("header's checksum ignored", headerGo, "!bytes.Equal(sum[:], b[hdrSum:])")},
	{Name: "record not closed", Breaks: "the header never says Idle again", Patches: begin("record not closed", logGo, "func (l *Log) Done() error {", "nil")},
	{Name: "record without Alloc", Breaks: "the record does not name what is taken", Patches: []Patch{
		{stepsGo, "rec.Free = journalRuns(fatdriver.Subtract(p.Freed(), p.Alloc()))", "", `
	if mutant("record without Alloc") {
		rec.Alloc = nil
	}
	if mutant("record without Free") {
		rec.Free = nil
	}
	if mutant("record without new content") {
		rec.Base = nil
	}`}}},
	{Name: "record without Free", Breaks: "the record does not name what is given up"},
	{Name: "record without new content", Breaks: "the record does not name what rolling forward relies on", First: "kernel"},
	{Name: "digest without old directories", Breaks: "rolling forward does not look at what it replaces", First: "kernel", Patches: []Patch{
		{planGo, "if len(p.Blocks) > 1 {", "len(p.Blocks) > 1", `len(p.Blocks) > 1 && !mutant("digest without old directories")`}}},

	{Name: "generation before the tree", Breaks: "a member's target remembers the run before its tree is the new one", First: "a member", Patches: []Patch{
		{stepsGo, "return s.tree.NewPlan(append(steps, anchors(note)), r.opt.KeepFree)", "append(steps, anchors(note))",
			"func() []fatdriver.Step {\nif mutant(\"generation before the tree\") {\nreturn append([]fatdriver.Step{anchors(note)}, steps...)\n}\nreturn append(steps, anchors(note))\n}()"}}},

	// Room for what is new.
	{Name: "files go before their entries", Breaks: "what makes room takes away kernels first, and then the entries that name them", First: "makes room", Patches: []Patch{
		{stageGo, "for _, list := range [][]string{entries, files} {", "for _,", "if mutant(\"files go before their entries\") {\nentries, files = files, entries\n}\nfor _,"}}},
	{Name: "no intent for making room", Breaks: "the transaction that makes room has no record", First: "makes room", Patches: []Patch{
		{journalGo, "if err := log.Prepare(rec); err != nil {", "log.Prepare(rec)", "skip(\"no intent for making room\", func() error { return log.Prepare(rec) })"}}},

	// Recovery.
	{Name: "no recovery before a sync", Breaks: "a sync plans on a volume with an unfinished record", Patches: []Patch{
		{syncGo, `rec, err := recoverVolume(s.vol, r.log.With("target", s.t.Name), thorough{})`, `rec, err := recoverVolume(s.vol, r.log.With("target", s.t.Name), thorough{})`,
			"var rec *Recovery\nif !mutant(\"no recovery before a sync\") {\nrec, err = recoverVolume(s.vol, r.log.With(\"target\", s.t.Name), thorough{})\n} else {\nrec = &Recovery{Action: actNothing}\n}"}}},
	{Name: "no flush before recovery", Breaks: "recovery acts on what a killed run left in a cache",
		Patches: noFlush("no flush before recovery", recoverGo, "// What a killed run left in a cache", "v.Device().Flush()")},
	{Name: "trusts a stale journal", Breaks: "rule R: a record is acted on though somebody else has written", First: "replace", Patches: []Patch{
		{recoverGo, "d, err := journal.Decide(rec, st, read, plausible)", "", "\nif mutant(\"trusts a stale journal\") && err == nil && d.Action == journal.Stale {\nreturn journal.Decision{Action: journal.RollForward}, nil\n}"}}},
	{Name: "no digest check", Breaks: "rule R: rolls forward over content that is not what the record says", First: "kernel",
		Patches: []Patch{{recoverGo, "if err != nil || sum != st.Digest {", "err != nil || sum != st.Digest", `(err != nil || sum != st.Digest) && !mutant("no digest check")`}}},
	{Name: "everything looks like garbage", Breaks: "a sector that another system changed is taken for garbage", First: "replace",
		Patches: begin("everything looks like garbage", mendGo, "func (v *Volume) PlausibleDir(img []byte) bool {", "false")},
	{Name: "nothing looks like garbage", Breaks: "a commit sector that became garbage is taken for another system's", First: "replace",
		Patches: begin("nothing looks like garbage", mendGo, "func (v *Volume) PlausibleDir(img []byte) bool {\n", "true")},
	{Name: "torn commit not recognised", Breaks: "a mixture of the old and the new sector is taken for another system's", First: "two files",
		Patches: and("torn commit not recognised", decideGo, "old != nil && mixture(s.got, old, r.Blocks[k].New)")},
	{Name: "no search for the journal", Breaks: "a journal to which no directory leads is not found",
		Patches: []Patch{{recoverGo, "if jl == nil && jerr == nil && (len(lost) > 0", "jl == nil", `!mutant("no search for the journal") && jl == nil`}}},
	{Name: "damage ignored", Breaks: "recovery frees what a damaged directory seems to have lost",
		Patches: []Patch{{recoverGo, "if err := tree.Damage(); err != nil {\n\t\treturn rec, &Hint{", "err != nil", `err != nil && !mutant("damage ignored")`}}},
	{Name: "does not roll forward", Breaks: "commits that are still to come never do", First: "kernel",
		Patches: []Patch{{recoverGo, "if decision.Action == journal.RollForward {", "decision.Action == journal.RollForward", `decision.Action == journal.RollForward && !mutant("does not roll forward")`}}},
	{Name: "rolls forward one too far", Breaks: "the first block that is still old is left out", First: "kernel",
		Patches: []Patch{{recoverGo, "for i := d.From; i < len(rec.Blocks); i++ {", "", "\nif i == d.From && mutant(\"rolls forward one too far\") {\ncontinue\n}"}}},
	{Name: "no flush while rolling forward", Breaks: "the commits of recovery are not ordered before what is freed", First: "kernel",
		Patches: noFlush("no flush while rolling forward", recoverGo, "// The next entry may switch only when this one has.", "v.Device().Flush()")},
	{Name: "no flush of a repaired commit", Breaks: "clusters are freed before the repaired sector is stable", First: "leaves the root",
		Patches: noFlush("no flush of a repaired commit", recoverGo, "cannot repair commit sector", "v.Device().Flush()")},
	{Name: "FAT copies stay different", Breaks: "recovery does not mend copy 1",
		Patches: begin("FAT copies stay different", mendGo, "func (v *Volume) MendFATs() (int64, error) {", "0, nil")},
	{Name: "mends copy 0 from copy 1", Breaks: "the copy that readers use is overwritten by the other", Patches: []Patch{
		{mendGo, "if _, err := v.dev.WriteAt(want[s:s+ss], off+s); err != nil {", "if _, err := v.dev.WriteAt(want[s:s+ss], off+s)",
			"to, what := off+s, want[s:s+ss]\nif mutant(\"mends copy 0 from copy 1\") {\nto, what = g.FATOff+at+s, have[s:s+ss]\n}\nif _, err := v.dev.WriteAt(what, to)"}}},
	{Name: "mends from a damaged copy", Breaks: "copy 1 is overwritten by a copy 0 that holds what nobody writes",
		Patches: begin("mends from a damaged copy", mendGo, "func (v *Volume) possible() error {", "nil")},
	{Name: "no flush of mended FATs", Breaks: "recovery may end before the mended copy is stable",
		Patches: noFlush("no flush of mended FATs", recoverGo, "if rec.FATsMended = mended", "v.Device().Flush()")},
	{Name: "frees before it mends FATs", Breaks: "recovery frees in copies that still differ", Patches: []Patch{
		{recoverGo, "mended, err := v.MendFATs()", "mended", `
	if mutant("frees before it mends FATs") && pending != nil {
		if _, err := tree.Release(volumeRuns(pending.Alloc), volumeRuns(pending.Free)); err != nil {
			return rec, err
		}
		if err := v.Device().Flush(); err != nil {
			return rec, err
		}
	}
	mended`}}},
	{Name: "closes the record before it frees", Breaks: "recovery forgets what it still has to free", Patches: []Patch{
		{recoverGo, "// R3: what the record took or gave up, and nobody can reach.", "", "\nif mutant(\"closes the record before it frees\") && pending != nil {\nif err := discard(v, jl); err != nil {\nreturn rec, err\n}\n}"}}},
	{Name: "recovery frees what is reachable", Breaks: "what the record names is freed, reachable or not", Patches: []Patch{
		{mendGo, "if e == entryBad || t.used.has(c) {", "t.used.has(c)", `t.used.has(c) && !mutant("recovery frees what is reachable")`}}},
	{Name: "recovery frees nothing", Breaks: "recovery leaves lost clusters behind", Patches: []Patch{
		{recoverGo, "n, err := tree.Release(free...)", "free...", `unless("recovery frees nothing", free)...`}}},
	{Name: "no flush after freeing", Breaks: "recovery closes the record before what it freed is stable",
		Patches: noFlush("no flush after freeing", recoverGo, "n, err := tree.Release(free...)", "v.Device().Flush()")},
	{Name: "free count not mended", Breaks: "recovery leaves FSInfo as it is", First: "FAT32",
		Patches: begin("free count not mended", mendGo, "func (v *Volume) MendFSInfo(onlyUnknown bool) (bool, error) {", "false, nil")},
	{Name: "recovery leaves the record open", Breaks: "the next recovery does it all again",
		Patches: begin("recovery leaves the record open", recoverGo, "func discard(v *fatdriver.Volume, jl *journal.Log) error {", "nil")},
	{Name: "recovery ends without a flush", Breaks: "recovery reports what is only in a cache",
		Patches: noFlush("recovery ends without a flush", recoverGo, "if err := jl.Done(); err != nil {", "v.Device().Flush()")},

	// Protected twice.
	{Name: "no flush of the idle header", Breaks: "the payload of the last record is overwritten before the header lets go of it",
		Patches:   noFlush("no flush of the idle header", logGo, "// The header that says Idle must be stable", "l.flush()"),
		Redundant: "B4 of the run before has flushed that header; it is for runs that were killed, and then the hash of the payload does not fit"},
	{Name: "no flush of the payload", Breaks: "the header may reach the medium before the record that it names",
		Patches:   noFlush("no flush of the payload", logGo, "// The payload must be stable before a header names it", "l.flush()"),
		Redundant: "the header's own flush comes before the build, and until then a record whose hash does not fit has nothing to undo"},
	{Name: "record's hash not checked", Breaks: "a record that is not the one that the header names is decoded",
		Patches:   and("record's hash not checked", logGo, "sum != l.head.payloadSum"),
		Redundant: "the flush of the payload comes before its header"},
	{Name: "no flush of the free count", Breaks: "recovery closes the record before the free count is stable",
		Patches:   noFlush("no flush of the free count", recoverGo, "if rec.FSInfoFixed {", "v.Device().Flush()"),
		Redundant: "the count on the medium is the unknown one until then, and every recovery and sync mends that, record or not"},
	{Name: "journal's binding not checked", Breaks: "a record of another volume is acted on",
		Patches:   and("journal's binding not checked", logGo, "win.h.Binding != b"),
		Redundant: "rule R asks for every commit sector, which another volume does not have"},
	{Name: "foreign journal: one slot", Breaks: "a journal that is made anew keeps a header of the other volume", First: "another volume", Patches: []Patch{
		{logGo, "for i := range uint64(2) {", "", "\nif i > 0 && mutant(\"foreign journal: one slot\") {\nbreak\n}"}},
		Redundant: "the first record overwrites that header, and until then there is nothing to undo"},
}
