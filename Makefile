# espmirror: see `make help`.

GO ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo 0.1.0-dev)
PREFIX ?= /usr/local
FUZZTIME ?= 30s
ROUNDS ?= 200
CRASHFLAGS ?=
BENCHFLAGS ?=
VMFLAGS ?=
TESTFLAGS ?=

# urfave_cli_no_docs leaves out the generators of Markdown and man pages: 1 MB of the binary.
TAGS = urfave_cli_no_docs
GOBUILD = CGO_ENABLED=0 $(GO) build -trimpath -tags $(TAGS)
BIN = out/espmirror
# The initramfs is loaded by firmware at each boot: the same program, without the sources that only builders of images have,
# and without inlining outside of the runtime, which makes it 0.4 MB smaller.
INITRDBIN = out/espmirror-initrd
INITRDFLAGS = -gcflags=all=-l -gcflags=runtime= -gcflags=internal/runtime/...=

.PHONY: all build demo test test-short lint fuzz bench crash kill-test judges vm install uninstall packages packages-test clean help
all: build

build: ## build the one static binary, out/espmirror, and the smaller one for an initramfs
	@mkdir -p out
	$(GOBUILD) -ldflags "-s -w -X main.version=$(VERSION)" -o $(BIN) ./cmd/espmirror
	$(GOBUILD),urfave_cli_no_suggest,initrd $(INITRDFLAGS) -ldflags "-s -w -X main.version=$(VERSION)" -o $(INITRDBIN) ./cmd/espmirror

demo: build ## two disk images, three syncs, one power cut, one recovery; no root, no other tool
	@scripts/demo.sh $(BIN)

test: judges ## every test; installs the judges first where it can
	@$(GO) vet ./...
	@$(GO) run ./scripts/testreport -timeout 10m $(TESTFLAGS) ./...

test-short: ## the quick part of the tests
	@$(GO) vet ./...
	@$(GO) run ./scripts/testreport -short -timeout 5m $(TESTFLAGS) ./...

judges:
	@scripts/judges.sh

lint: ## gofmt, go vet; golangci-lint and shellcheck where they are installed
	@files=$$(gofmt -l .); if [ -n "$$files" ]; then echo "not formatted: $$files"; exit 1; fi
	$(GO) vet ./...
	@if command -v golangci-lint >/dev/null; then golangci-lint run ./...; else echo "skipped: golangci-lint is not installed"; fi
	@if command -v shellcheck >/dev/null; then shellcheck scripts/*.sh .ci/run; else echo "skipped: shellcheck is not installed"; fi

fuzz: ## every fuzz target for FUZZTIME (30s) each
	@for dir in $$(grep -rl '^func Fuzz' --include='*_test.go' . | xargs -n1 dirname | sort -u); do \
		for f in $$(grep -ho '^func Fuzz[A-Za-z0-9_]*' $$dir/*_test.go | cut -c6-); do \
			echo "$$dir $$f"; \
			$(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$dir || exit 1; \
		done; \
	done

bench: build judges ## times and exact counts beside mtools, as a table; BENCHFLAGS="-runs 5"
	@$(GO) run ./scripts/bench $(BENCHFLAGS) $(BIN)

crash: judges ## power cuts by the million, with every judge; goes on where it was stopped; CRASHFLAGS="-time 1h"
	@mkdir -p out
	@$(GO) build -o out/crash-tool ./scripts/crash
	@out/crash-tool -report docs/crash-report.json -doc docs/power-cuts.md $(CRASHFLAGS)

kill-test: build judges ## kill -9 of sync at ROUNDS (200) random moments on a loop device; needs root
	@scripts/kill-test.sh $(ROUNDS)

vm: build judges packages ## boots in virtual machines with our package, as a table and in docs/vm.md; needs root, half an hour; VMFLAGS="-only a,f"
	@$(GO) run ./scripts/vm -deb out/packages/espmirror_*.deb -doc docs/vm.md $(VMFLAGS)

# PREFIX, SBINDIR, LIBDIR, UNITDIR, … are explained in scripts/packages/install; `make uninstall` needs the same ones.
INSTALLVARS = DESTDIR PREFIX SBINDIR LIBDIR DOCDIR MANDIR UNITDIR PRESETDIR UDEVRULESDIR KERNELINSTALLDIR DRACUTDIR FORMATS
INSTALLENV = $(foreach v,$(INSTALLVARS),$(if $($(v)),$(v)='$($(v))'))

install: build ## the program, units and hooks, below DESTDIR; our own files go to PREFIX (/usr/local), or where SBINDIR=… says
	@$(INSTALLENV) scripts/packages/install install

uninstall: ## take away what install put there
	@$(INSTALLENV) scripts/packages/install uninstall

packages: build ## .deb, .rpm and Arch packages in out/packages, the same bytes for the same commit; needs the Go module proxy
	@GO='$(GO)' scripts/packages/build

packages-test: ## builds the packages twice, differently, and installs and removes them in a fake root; needs root for that
	@ESPMIRROR_PACKAGES=1 $(GO) test -count=1 -v -run '^TestPackage' ./scripts/dist

clean: ## remove what was built
	rm -rf out

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile
