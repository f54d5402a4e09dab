//go:build !initrd

package main

// forInitrd says that this is the program for an initramfs: see initrd.go.
const forInitrd = false
