// Package e2e runs whole labs: each file in scenarios is a script that brings a lab up, does to it what a
// person would do, looks at what a person would look at, and takes it down. docs of the language:
// https://pkg.go.dev/github.com/rogpeppe/go-internal/testscript; the commands of ours are in commands_test.go.
package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// A lab is named after its scenario. The uplink of a lab with a longer name is shortened by a hash, and the
// records of leftovers could not be told apart by it.
const (
	labPrefix     = "t-"
	longestScript = 9
)

// scenarios is the directory of the scripts.
const scenarios = "scenarios"

func TestScenarios(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "needs root: nodes are namespaces, mounts and devices")
	}
	fathom := os.Getenv("FATHOM")
	if fathom == "" {
		fathom = "../../bin/fathom"
	}
	fathom, err := filepath.Abs(fathom)
	if err != nil {
		t.Fatal(err)
	}
	kubectl := filepath.Join(filepath.Dir(fathom), "kit", "bin", "kubectl")
	for _, path := range []string{fathom, kubectl} {
		if _, err := os.Stat(path); err != nil {
			skip(t, "needs "+path+": make build")
		}
	}
	deadline, _ := t.Deadline()
	if together() {
		restore, err := moreInotify(inotifyInstances)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(restore)
	}
	testscript.RunT(runner{T: t}, testscript.Params{
		Dir:      scenarios,
		Deadline: deadline,
		Setup: func(env *testscript.Env) error {
			return setup(env, fathom, kubectl)
		},
		Condition: condition,
		Cmds:      commands,
	})
}

// skip skips the test, or fails it where FATHOM_REQUIRE_ROOT says that nothing may be skipped, as in CI.
func skip(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("FATHOM_REQUIRE_ROOT") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func setup(env *testscript.Env, fathom, kubectl string) error {
	t := env.T().(runner)
	script := filepath.Base(t.Name())
	if len(script) > longestScript {
		return fmt.Errorf("scenario %q: a name of at most %d letters, please", script, longestScript)
	}
	lab := labPrefix + script
	home := filepath.Join(env.WorkDir, ".home")
	if err := os.Mkdir(home, 0o700); err != nil {
		return err
	}
	testdata, err := filepath.Abs("testdata")
	if err != nil {
		return err
	}
	for k, v := range map[string]string{
		"PATH":       strings.Join([]string{filepath.Dir(fathom), os.Getenv("PATH"), "/usr/sbin", "/sbin"}, ":"),
		"FATHOM":     fathom,
		"KUBECTL":    kubectl,
		"LAB":        lab,
		"HOME":       home,
		"KUBECONFIG": filepath.Join(env.WorkDir, ".kubeconfig"),
		"TESTDATA":   testdata,
		"TERM":       "dumb",
	} {
		env.Setenv(k, v)
	}
	s := &session{t: t.T, env: env, lab: lab, alone: t.alone, state: "/var/lib/fathom"}
	env.Values[sessionKey{}] = s
	// What a run that was killed has left.
	if out, err := s.down(); err != nil {
		return fmt.Errorf("clear what an earlier run left of lab %s: %w\n%s", lab, err, out)
	}
	s.before = takeSnapshot(lab, env.WorkDir)
	env.Defer(s.end)
	return nil
}

// session is what the commands of one scenario share.
type session struct {
	t      *testing.T
	env    *testscript.Env
	lab    string
	alone  bool                     // no other scenario runs
	state  string                   // where fathom keeps labs
	own    string                   // the same if it is the scenario's own, as FATHOM_STATE has it
	before snapshot                 // the host before the scenario
	took   map[string]time.Duration // what `up` takes undisturbed, by its arguments
	talks  []*talk                  // connections between pods
	asker  *asker                   // somebody outside
	closer []func()
}

type sessionKey struct{}

func sessionOf(ts *testscript.TestScript) *session { return ts.Value(sessionKey{}).(*session) }

// end takes the lab down, also of a scenario that failed, after telling what state it was in. Nothing may be
// left of it.
func (s *session) end() {
	if s.t.Failed() {
		s.diagnose()
	}
	for _, t := range s.talks {
		t.end()
	}
	if out, err := s.down(); err != nil {
		s.t.Errorf("take lab %s down: %v\n%s", s.lab, err, out)
	}
	for _, undo := range s.closer {
		undo()
	}
	if left := s.leftovers(); left != "" {
		s.t.Errorf("after the scenario the host is not as it was:\n%s", left)
	}
}

// down takes the lab down if there is any trace of it.
func (s *session) down() (string, error) {
	if s.own != "" { // whatever labs are in it, they are the scenario's
		return s.fathom("down", "--all")
	}
	out, err := s.fathom("down")
	if err != nil && strings.Contains(out, "there is no lab") {
		return "", nil
	}
	return out, err
}

func (s *session) fathom(args ...string) (string, error) {
	cmd := exec.Command(s.env.Getenv("FATHOM"), append([]string{"--name", s.lab}, args...)...)
	cmd.Env = append(s.env.Vars, "FATHOM_STATE="+s.own)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// diagnose logs what one would look at first.
func (s *session) diagnose() {
	if _, err := os.Stat(s.state + "/labs/" + s.lab); errors.Is(err, os.ErrNotExist) {
		return
	}
	status, _ := s.fathom("status")
	s.t.Logf("fathom status\n%s", status)
	for context := range strings.FieldsSeq(s.output(20*time.Second, s.env.Getenv("KUBECTL"), "config", "get-contexts", "-o", "name")) {
		if !strings.HasPrefix(context, s.lab+"-") {
			continue
		}
		for _, args := range [][]string{
			{"get", "pods", "-A", "-o", "wide"},
			{"get", "events", "-A", "--field-selector=type!=Normal"},
		} {
			args = append([]string{"--context", context, "--request-timeout=5s"}, args...)
			s.t.Logf("kubectl %s\n%s", strings.Join(args, " "), s.output(20*time.Second, s.env.Getenv("KUBECTL"), args...))
		}
	}
}

func (s *session) output(timeout time.Duration, program string, args ...string) string {
	out, err := run(timeout, s.env.Vars, "", program, args...).CombinedOutput()
	if err != nil {
		return string(out) + err.Error()
	}
	return string(out)
}
