package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// commands are what scenarios say beside testscript's own words.
//
//	fathom ARGS…                 fathom, for the scenario's lab ($LAB)
//	kubectl CLUSTER ARGS…        the kit's kubectl with the context that `fathom up` wrote into $KUBECONFIG
//	on NODE CMD…                 a command on a node
//	eventually TIME [fails|prints REGEXP] CMD…
//	                             CMD again and again until it succeeds (fails, prints), within TIME
//	within TIME CMD…             CMD, which has to end before that
//	capture NAME CMD…            set the variable NAME to what CMD prints
//	own-state                    a state directory for this scenario alone, in which no image is prepared
//	own-disk SIZE                the same on a file system of that size, mounted at .state
//	more-inotify N               raise the host's limit of inotify instances to N until the scenario ends
//	objects CLUSTER FILE         write the cluster's objects into a file, without what differs between two clusters of one description
//	objects -exact CLUSTER FILE  the same, without what differs in a lab that begins where it was saved
//	nothing-left                 the host looks as it did before the scenario; each scenario ends with it
//
// $FATHOM_TEST_SLOW is how many times longer everything may take, on a machine that is emulated. It goes for the
// --timeout of kubectl as well. Everything may take twice as long, too, while another scenario runs: together_test.go.
var commands = map[string]func(ts *testscript.TestScript, neg bool, args []string){
	"fathom":       plain("fathom"),
	"kubectl":      plain("kubectl"),
	"on":           plain("on"),
	"eventually":   cmdEventually,
	"within":       cmdWithin,
	"capture":      cmdCapture,
	"own-state":    cmdOwnState,
	"own-disk":     cmdOwnDisk,
	"more-inotify": cmdMoreInotify,
	"nothing-left": cmdNothingLeft,
	"objects":      cmdObjects,
}

// commandTimeout bounds one command of a scenario. What takes longer hangs.
const commandTimeout = 5 * time.Minute

// slow is $FATHOM_TEST_SLOW.
func slow() time.Duration {
	if n, err := strconv.Atoi(os.Getenv("FATHOM_TEST_SLOW")); err == nil && n > 1 {
		return time.Duration(n)
	}
	return 1
}

func plain(name string) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		argv := resolve(ts, append([]string{name}, args...))
		expect(ts, neg, ts.Exec(argv[0], argv[1:]...))
	}
}

func expect(ts *testscript.TestScript, neg bool, err error) {
	switch {
	case err != nil && !neg:
		ts.Fatalf("unexpected failure: %v", err)
	case err == nil && neg:
		ts.Fatalf("unexpected success")
	}
}

// resolve makes the command line that a word of ours stands for.
func resolve(ts *testscript.TestScript, argv []string) []string {
	if len(argv) == 0 {
		ts.Fatalf("a command is missing")
	}
	args := argv[1:]
	needOne := func(what string) {
		if len(args) < 2 {
			ts.Fatalf("usage: %s %s ARGS…", argv[0], what)
		}
	}
	fathom := []string{ts.Getenv("FATHOM"), "--name", ts.Getenv("LAB")}
	switch argv[0] {
	case "fathom":
		return append(fathom, args...)
	case "kubectl":
		needOne("CLUSTER")
		argv := []string{ts.Getenv("KUBECTL"), "--context", ts.Getenv("LAB") + "-" + args[0]}
		for _, arg := range args[1:] {
			if limit, found := strings.CutPrefix(arg, "--timeout="); found {
				arg = "--timeout=" + duration(ts, limit).String()
			}
			argv = append(argv, arg)
		}
		return argv
	case "exec":
		return args
	case "in":
		needOne("NAME")
		return append([]string{"nsenter", "--net=" + ts.Getenv(args[0])}, args[1:]...)
	case "on":
		needOne("NODE")
		return append(append(fathom, "node", "exec", args[0], "--"), args[1:]...)
	}
	return argv
}

// run makes a command that ends when the time is over, with all that it started and that holds its output.
func run(timeout time.Duration, env []string, dir, program string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env, cmd.Dir, cmd.WaitDelay = env, dir, time.Second
	context.AfterFunc(ctx, cancel)
	return cmd
}

// try runs a command of a scenario and keeps what it printed to itself.
func try(ts *testscript.TestScript, timeout time.Duration, argv []string) (stdout, stderr string, err error) {
	argv = resolve(ts, argv)
	var out, errOut strings.Builder
	program, err := lookPath(argv[0], ts.Getenv("PATH"))
	if err != nil {
		return "", "", err
	}
	cmd := run(timeout, environment(ts), ts.MkAbs("."), program, argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

// environment is what commands of ours run with.
func environment(ts *testscript.TestScript) []string {
	var env []string
	for _, name := range []string{"PATH", "HOME", "KUBECONFIG", "TERM", "LAB", "FATHOM", "KUBECTL", "WORK", "TMPDIR", "FATHOM_STATE"} {
		if value := ts.Getenv(name); value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env
}

func lookPath(program, path string) (string, error) {
	if strings.Contains(program, "/") {
		return program, nil
	}
	for dir := range strings.SplitSeq(path, ":") {
		file := dir + "/" + program
		if info, err := os.Stat(file); err == nil && info.Mode()&0o111 != 0 && !info.IsDir() {
			return file, nil
		}
	}
	return "", fmt.Errorf("there is no program %s", program)
}

func duration(ts *testscript.TestScript, s string) time.Duration {
	d, err := time.ParseDuration(s)
	ts.Check(err)
	return d * slow() * time.Duration(sessionOf(ts).patience())
}

func cmdEventually(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: eventually TIME [fails | prints REGEXP | omits REGEXP] CMD…")
	}
	limit, argv := duration(ts, args[0]), args[1:]
	good := func(_ string, err error) bool { return err == nil }
	switch argv[0] {
	case "fails":
		argv = argv[1:]
		good = func(_ string, err error) bool { return err != nil }
	case "prints", "omits":
		if len(argv) < 3 {
			ts.Fatalf("usage: eventually TIME %s REGEXP CMD…", argv[0])
		}
		re, err := regexp.Compile("(?m)" + argv[1])
		ts.Check(err)
		want := argv[0] == "prints"
		argv = argv[2:]
		good = func(out string, err error) bool { return err == nil && re.MatchString(out) == want }
	}
	start := time.Now()
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		stdout, stderr, err := try(ts, limit, argv)
		done := good(stdout, err)
		if !done && time.Since(start) < limit {
			time.Sleep(pause)
			continue
		}
		fmt.Fprint(ts.Stdout(), stdout)
		fmt.Fprint(ts.Stderr(), stderr)
		if !done {
			ts.Fatalf("not within %s (last: %v)", limit, err)
		}
		ts.Logf("after %.1fs", time.Since(start).Seconds())
		return
	}
}

func cmdWithin(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: within TIME CMD…")
	}
	limit := duration(ts, args[0])
	start := time.Now()
	stdout, stderr, err := try(ts, limit, args[1:])
	fmt.Fprint(ts.Stdout(), stdout)
	fmt.Fprint(ts.Stderr(), stderr)
	took := time.Since(start)
	if took >= limit {
		ts.Fatalf("not within %s", limit)
	}
	expect(ts, neg, err)
	ts.Logf("after %.1fs", took.Seconds())
}

func cmdCapture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: capture NAME CMD…")
	}
	stdout, stderr, err := try(ts, commandTimeout*slow(), args[1:])
	fmt.Fprint(ts.Stdout(), stdout)
	fmt.Fprint(ts.Stderr(), stderr)
	expect(ts, false, err)
	if stdout = strings.TrimSpace(stdout); stdout == "" {
		ts.Fatalf("nothing was printed")
	}
	ts.Setenv(args[0], stdout)
}

func cmdOwnState(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: own-state")
	}
	s := sessionOf(ts)
	s.own = ts.MkAbs(".state")
	s.state = s.own
	ts.Setenv("FATHOM_STATE", s.own)
}

func cmdOwnDisk(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: own-disk SIZE")
	}
	disk, dir := ts.MkAbs(".disk"), ts.MkAbs(".state")
	ts.Check(os.Mkdir(dir, 0o755))
	ts.Check(ts.Exec("truncate", "-s", args[0], disk))
	ts.Check(ts.Exec("mkfs.ext4", "-q", "-m", "0", disk)) // as root fills it
	ts.Check(ts.Exec("mount", "-o", "loop", disk, dir))
	s := sessionOf(ts)
	s.closer = append(s.closer, func() { s.output(time.Minute, "/bin/umount", dir) })
	cmdOwnState(ts, false, nil)
}

func cmdMoreInotify(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: more-inotify N")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	restore, err := moreInotify(want)
	ts.Check(err)
	s := sessionOf(ts)
	s.closer = append(s.closer, restore)
}

// moreInotify raises the host's limit of inotify instances to want, if it is lower, and returns what sets it back.
func moreInotify(want int) (restore func(), err error) {
	const file = "/proc/sys/fs/inotify/max_user_instances"
	was, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	have, err := strconv.Atoi(strings.TrimSpace(string(was)))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	if have >= want {
		return func() {}, nil
	}
	return func() { _ = os.WriteFile(file, was, 0) }, os.WriteFile(file, []byte(strconv.Itoa(want)), 0)
}

// condition answers for the words in brackets: what the kernel has.
func condition(cond string) (bool, error) {
	switch cond {
	case "long":
		return os.Getenv("FATHOM_E2E_LONG") != "", nil
	case "ipvs":
		_ = exec.Command("modprobe", "ip_vs").Run()
		_, err := os.Stat("/proc/net/ip_vs")
		return err == nil, nil
	case "loop":
		return exec.Command("sh", "-c", "losetup -f && which mkfs.ext4").Run() == nil, nil
	case "cgroup2":
		_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
		return err == nil, nil
	case "netem":
		return exec.Command("unshare", "-n", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms").Run() == nil, nil
	}
	return false, fmt.Errorf("unknown condition %q", cond)
}
