package main

import (
	"context"
	"encoding/json"
	"io"
	"os"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
	"espmirror/replicate"
)

// makeVolume makes an empty FAT32 volume in a new image.
func makeVolume(path string, size int64, serial uint32) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := f.Truncate(size); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	d, err := blockdev.Open(path, blockdev.ReadWrite)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := d.Close(); err == nil {
			err = cerr
		}
	}()
	return fatdriver.Format(d, fatdriver.FormatOptions{Type: fatdriver.FAT32, SectorsPerCluster: 8, Serial: serial})
}

// writeTree writes a tree below dir, in place of what is there.
func writeTree(dir string, t fixtures.TreeSpec) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return t.Write(dir)
}

// countedSync syncs a directory to a volume and prints what reached the device.
func countedSync(w io.Writer, dir, target string) error {
	src, err := replicate.OpenDirSource(dir)
	if err != nil {
		return err
	}
	defer src.Close()
	d, err := blockdev.Open(target, blockdev.ReadWrite)
	if err != nil {
		return err
	}
	defer d.Close()
	count := blockdev.NewCounting(d)
	results, err := replicate.Sync(context.Background(), src, []*replicate.Target{{Name: target, Dev: count}}, replicate.Options{})
	if err != nil {
		return err
	}
	if err := results[0].Err; err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(count.Counts())
}
