package e2e

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// Scenarios run two at a time, since for much of their time they wait. Those that say `alone` run one after the other, before the rest.
//
//	alone WHY…       the scenario has the machine for itself: it asserts a time, or fills what all labs share
func init() {
	commands["alone"] = cmdAlone
}

const (
	// atOnce is how many scenarios run at a time. A third gains nothing on a small machine, and doubles what a failure may be due to.
	atOnce = 2
	// memoryEach is what a scenario's labs take at most, in kB.
	memoryEach = 4 << 20
	// inotifyInstances is the limit that two scenarios need, and that `fathom doctor` advises. Many machines have 128.
	inotifyInstances = 1024
)

func TestMain(m *testing.M) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		n := 1
		if runtime.NumCPU() >= atOnce && availableMemory() >= atOnce*memoryEach {
			n = atOnce
		}
		if err := flag.Set("test.parallel", strconv.Itoa(n)); err != nil {
			panic(err) // there is such a flag, and it takes numbers
		}
	}
	os.Exit(m.Run())
}

// together says whether scenarios share the machine: `go test -parallel 1` has each run alone.
func together() bool { return flag.Lookup("test.parallel").Value.String() != "1" }

// availableMemory is the kernel's estimate of what new programs can have, in kB.
func availableMemory() int {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	m := regexp.MustCompile(`(?m)^MemAvailable: +(\d+) kB$`).FindSubmatch(data)
	if m == nil {
		return 0
	}
	n, err := strconv.Atoi(string(m[1]))
	if err != nil {
		return 0
	}
	return n
}

// runner is the test that testscript runs scripts in.
type runner struct {
	*testing.T
	alone bool
}

func (r runner) Verbose() bool { return testing.Verbose() }

func (r runner) Run(name string, f func(testscript.T)) {
	r.T.Run(name, func(t *testing.T) {
		script, err := os.ReadFile(filepath.Join(scenarios, name+".txtar"))
		if err != nil {
			t.Fatal(err)
		}
		f(runner{t, saysAlone(script)})
	})
}

func (r runner) Parallel() {
	if !r.alone {
		r.T.Parallel()
	}
}

var aloneLine = regexp.MustCompile(`(?m)^alone `)

// saysAlone says whether a script has the line `alone`, and not only one of its files.
func saysAlone(script []byte) bool {
	commands, _, _ := bytes.Cut(script, []byte("\n-- "))
	return aloneLine.Match(commands)
}

func TestSaysAlone(t *testing.T) {
	for script, want := range map[string]bool{
		"# Comment.\n\nalone it asserts a time\nexec true\n":     true,
		"# Comment.\n\nexec true\n":                              false,
		"# It is not\n# alone here.\nexec true\n":                false,
		"exec true\n-- file --\nalone in a file of the script\n": false,
	} {
		if have := saysAlone([]byte(script)); have != want {
			t.Errorf("%q: %v, want %v", script, have, want)
		}
	}
}

func cmdAlone(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: alone WHY…")
	}
	if !sessionOf(ts).alone {
		ts.Fatalf("the line with alone has to begin with that word") // saysAlone has not seen it
	}
}

// patience is how many times longer what a scenario waits for may take, for another one runs at the same time.
func (s *session) patience() int {
	if together() && !s.alone {
		return atOnce
	}
	return 1
}
