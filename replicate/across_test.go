package replicate

import (
	"fmt"
	"testing"

	"espmirror/fatdriver"
)

// TestJournalAcrossSectors creates the journal where the slots of its directory would lie in two sectors. No record
// protects that, so a cut must not leave long-name slots that nobody removes.
func TestJournalAcrossSectors(t *testing.T) {
	for _, g := range geometries {
		if g.typ == fatdriver.FAT32 || g.name == "FAT16" {
			continue // one sector to the cluster
		}
		if g.sector == 512 {
			g.spc = 4
		}
		for _, free := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s/%d", g.name, free), func(t *testing.T) {
				t.Parallel()
				m := newVolume(t, g)
				efi := &fatdriver.Want{Name: "EFI", Dir: true}
				for i := 2; i < g.sector/32-free; i++ {
					efi.Children = append(efi.Children, &fatdriver.Want{Name: fmt.Sprintf("F%d", i)})
				}
				put(t, m, efi)
				// What lies behind the end marker must not come alive.
				v, tree := scanned(t, m)
				geo := v.Geometry()
				copy(m.Bytes()[geo.ClusterOff(tree.Lookup("EFI").Runs[0].First)+int64(g.sector):], "\xE5STALE  BIN")
				o := Options{Selection: Selection{Select: []string{"loader"}}}
				c := record1(t, g, m.Bytes(), newMemSource(map[string]string{"loader/x": "1"}), o)
				if err := c.explore(c.rec, 300, 10); err != nil {
					t.Fatal(err)
				}
			})
		}
	}
}
