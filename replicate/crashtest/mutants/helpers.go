package mutants

// selector is added to each package that is patched. %s is its name.
const selector = `package %s

import "os"

// mutant says whether the mutant of that name is on. Setting up a scenario turns it off, hence no constant.
func mutant(name string) bool { return os.Getenv("ESPMIRROR_MUTANT") == name }

func unchecked() bool { return os.Getenv("ESPMIRROR_UNCHECKED") != "" }

func skip(name string, f func() error) error {
	if mutant(name) {
		return nil
	}
	return f()
}

func unless[T any](name string, v []T) []T {
	if mutant(name) {
		return nil
	}
	return v
}

// tail cuts zeros off a directory, but no part of a slot.
func tail(name string, b []byte) []byte {
	n := len(b)
	for mutant(name) && n > 0 && b[n-1] == 0 {
		n--
	}
	return b[:(n+31)/32*32]
}

func more(name string, size int64) int64 {
	if mutant(name) && size > 0 && size%%512 == 0 {
		return 1
	}
	return 0
}

var _, _, _, _, _ = unchecked, skip, unless[int], tail, more
`
