#!/bin/sh
# dracut hook, sourced by init: it neither exits nor changes a variable, and initrd-run always returns 0.
# The root device is there; nothing is mounted yet.
test ! -x @LIBDIR@/initrd-run || @LIBDIR@/initrd-run
