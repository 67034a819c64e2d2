package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// Commands that break things at random moments. The moments are spread over the time that the command takes
// when nobody disturbs it; $FATHOM_SEED repeats those of an earlier run.
//
//	break-up SIGNAL ROUNDS ARGS…   `fathom up ARGS…` gets the signal; then, by turns, `down` leaves nothing,
//	                               and `up` goes on to Ready nodes, whereupon `down` leaves nothing; with a
//	                               state of the scenario's own, the images are made anew each time
//	break-node ROUNDS NODE ARGS…   during `fathom up ARGS…` the node's init is killed; `up` mends it
//	break-down ROUNDS ARGS…        `fathom down` is killed; the next `down` leaves nothing
func init() {
	commands["break-up"] = cmdBreakUp
	commands["break-node"] = cmdBreakNode
	commands["break-down"] = cmdBreakDown
}

// moments are points of time in the whole, one in each part of it, in random places.
func moments(ts *testscript.TestScript, rounds string, whole time.Duration) []time.Duration {
	n, err := strconv.Atoi(rounds)
	ts.Check(err)
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("FATHOM_SEED"); s != "" {
		seed, err = strconv.ParseUint(s, 10, 64)
		ts.Check(err)
	}
	ts.Logf("FATHOM_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	var all []time.Duration
	for i := range n {
		part := whole / time.Duration(n)
		all = append(all, part*time.Duration(i)+time.Duration(r.Float64()*float64(part)))
	}
	return all
}

// start starts fathom for the scenario's lab, with an end that can be waited for.
func start(ts *testscript.TestScript, args ...string) (*exec.Cmd, *bytes.Buffer) {
	argv := resolve(ts, append([]string{"fathom"}, args...))
	var out bytes.Buffer
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env, cmd.Dir = environment(ts), ts.MkAbs(".")
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	ts.Check(cmd.Start())
	return cmd, &out
}

// must runs fathom, which has to succeed, and returns how long it took.
func must(ts *testscript.TestScript, args ...string) time.Duration {
	begin := time.Now()
	stdout, stderr, err := try(ts, commandTimeout*slow(), append([]string{"fathom"}, args...))
	if err != nil {
		ts.Fatalf("fathom %s: %v\n%s%s", strings.Join(args, " "), err, stdout, stderr)
	}
	return time.Since(begin)
}

// undisturbed tells how long `up` takes when nothing happens. A scenario measures it once.
func undisturbed(ts *testscript.TestScript, up []string) time.Duration {
	s := sessionOf(ts)
	key := strings.Join(up, " ")
	if s.took[key] == 0 {
		if s.took == nil {
			s.took = map[string]time.Duration{}
		}
		s.took[key] = must(ts, up...)
		clean(ts)
		ts.Logf("undisturbed: %.1fs", s.took[key].Seconds())
	}
	return s.took[key]
}

// ready fails the scenario unless every node is Ready.
func ready(ts *testscript.TestScript) {
	stdout, stderr, err := try(ts, commandTimeout*slow(), []string{"fathom", "status", "-o", "json"})
	if err != nil || !strings.Contains(stdout, `"state": "ready"`) || strings.Contains(stdout, `"ready": false`) {
		ts.Fatalf("not every node is Ready: %v\n%s%s", err, stdout, stderr)
	}
}

// clean takes the lab down, which has to leave nothing.
func clean(ts *testscript.TestScript) {
	stdout, stderr, err := try(ts, commandTimeout*slow(), []string{"fathom", "down"})
	if err != nil && !strings.Contains(stderr, "there is no lab") { // killed before it began
		ts.Fatalf("fathom down: %v\n%s%s", err, stdout, stderr)
	}
	if left := sessionOf(ts).leftovers(); left != "" {
		ts.Fatalf("down leaves:\n%s", left)
	}
}

// signals are those that scenarios name.
var signals = map[string]syscall.Signal{"KILL": syscall.SIGKILL, "INT": syscall.SIGINT, "TERM": syscall.SIGTERM}

func cmdBreakUp(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 || signals[args[0]] == 0 {
		ts.Fatalf("usage: break-up KILL|INT|TERM ROUNDS ARGS…")
	}
	signal, up := signals[args[0]], append([]string{"up"}, args[2:]...)
	whole := undisturbed(ts, up)
	for i, at := range moments(ts, args[1], whole) {
		if sessionOf(ts).own != "" {
			must(ts, "down", "--all", "--purge")
		}
		cmd, out := start(ts, up...)
		time.Sleep(at)
		_ = cmd.Process.Signal(signal)
		asked := time.Now()
		err := cmd.Wait()
		ts.Logf("%s after %.2fs: %v, %.2fs later", args[0], at.Seconds(), err, time.Since(asked).Seconds())
		if err != nil && signal == syscall.SIGINT {
			var exited *exec.ExitError
			if !errors.As(err, &exited) || exited.ExitCode() != 130 || !strings.Contains(out.String(), "fathom: interrupted") {
				ts.Fatalf("want the status 130 and a word about it, got %v\n%s", err, out)
			}
			if took := time.Since(asked); took > 15*time.Second*slow() {
				ts.Fatalf("it took %s to give up", took)
			}
		}
		if i%2 == 1 {
			took := must(ts, up...)
			ready(ts)
			ts.Logf("up again: %.1fs", took.Seconds())
		}
		clean(ts)
	}
}

func cmdBreakNode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: break-node ROUNDS NODE ARGS…")
	}
	node, up := args[1], append([]string{"up"}, args[2:]...)
	whole := undisturbed(ts, up)
	for _, at := range moments(ts, args[0], whole) {
		cmd, out := start(ts, up...)
		time.Sleep(at)
		pid := initOf(ts, node)
		if pid != 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		// It fails and says why; or the node was not needed any more.
		time.AfterFunc(5*time.Second, func() { _ = cmd.Process.Signal(syscall.SIGINT) })
		err := cmd.Wait()
		ts.Logf("init %d killed after %.2fs: %v", pid, at.Seconds(), err)
		if err != nil && !strings.Contains(out.String(), "fathom: ") {
			ts.Fatalf("it failed without a word: %v\n%s", err, out)
		}
		took := must(ts, up...)
		ready(ts)
		ts.Logf("up again: %.1fs", took.Seconds())
		clean(ts)
	}
}

func cmdBreakDown(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: break-down ROUNDS ARGS…")
	}
	up := append([]string{"up"}, args[1:]...)
	for _, at := range moments(ts, args[0], time.Second) {
		must(ts, up...)
		cmd, _ := start(ts, "down")
		time.Sleep(at)
		_ = cmd.Process.Kill()
		ts.Logf("KILL of down after %.2fs: %v", at.Seconds(), cmd.Wait())
		clean(ts)
	}
}

// initOf returns the process id of a node's init, or 0.
func initOf(ts *testscript.TestScript, node string) int {
	stdout, _, err := try(ts, commandTimeout*slow(), []string{"fathom", "node", "ls", "-o", "json"})
	if err != nil {
		return 0
	}
	var nodes []struct {
		Name string
		Pid  int
	}
	if err := json.Unmarshal([]byte(stdout), &nodes); err != nil {
		ts.Fatalf("fathom node ls -o json: %v\n%s", err, stdout)
	}
	for _, n := range nodes {
		if n.Name == node {
			return n.Pid
		}
	}
	return 0
}
