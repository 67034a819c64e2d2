package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// Commands about machines that are no part of a lab: routers and clients.
//
//	outside NAME…        network namespaces of such machines, until the scenario ends, with lo up; $NAME is the path of each
//	cable A:DEV B:DEV    a cable between two of them; the end "switch:CLUSTER" is a port of that cluster's switch
//	in NAME CMD…         CMD in one of them
//	begin NAME CMD…      the same, and it goes on until the scenario ends
func init() {
	commands["outside"] = cmdOutside
	commands["cable"] = cmdCable
	commands["in"] = plain("in")
	commands["begin"] = cmdBegin
}

func cmdOutside(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: outside NAME…")
	}
	s := sessionOf(ts)
	for _, name := range args {
		cmd := exec.Command("unshare", "--net", "sleep", "infinity")
		ts.Check(cmd.Start())
		s.closer = append(s.closer, func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		path := fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)
		own, err := os.Readlink("/proc/self/ns/net")
		ts.Check(err)
		for began := time.Now(); ; time.Sleep(time.Millisecond) {
			if its, err := os.Readlink(path); err == nil && its != own {
				break
			} else if time.Since(began) > 10*time.Second {
				ts.Fatalf("unshare --net: there is no namespace: %v", err)
			}
		}
		ts.Setenv(name, path)
		ts.Check(ts.Exec("nsenter", "--net="+path, "ip", "link", "set", "lo", "up"))
	}
}

func cmdCable(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: cable A:DEV B:DEV")
	}
	var ends [2]struct{ path, device, master string }
	for i, arg := range args {
		name, device, found := strings.Cut(arg, ":")
		if !found {
			ts.Fatalf("cable: %q: want NAME:DEV", arg)
		}
		ends[i].path, ends[i].device = ts.Getenv(name), device
		if name == "switch" {
			ends[i].path = filepath.Join("/run/fathom", ts.Getenv("LAB"), "netns", "switch-"+device)
			ends[i].device, ends[i].master = fmt.Sprintf("outside%d", i), "switch"
			// A switch may have several such ports.
			if other, _, _ := strings.Cut(args[1-i], ":"); other != "" {
				ends[i].device = "to-" + other
			}
		}
	}
	// Made in one of them, since the host's own devices are none of a test's.
	a, b := ends[0], ends[1]
	ts.Check(ts.Exec("nsenter", "--net="+a.path, "ip", "link", "add", a.device, "type", "veth", "peer", "name", b.device, "netns", b.path))
	for _, end := range ends {
		set := []string{"--net=" + end.path, "ip", "link", "set", end.device, "up"}
		if end.master != "" {
			set = append(set, "master", end.master)
		}
		ts.Check(ts.Exec("nsenter", set...))
	}
}

func cmdBegin(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: begin NAME CMD…")
	}
	program, err := lookPath(args[1], ts.Getenv("PATH"))
	ts.Check(err)
	s := sessionOf(ts)
	log, err := os.Create(ts.MkAbs(fmt.Sprintf(".log-%d", len(s.closer))))
	ts.Check(err)
	cmd := exec.Command("nsenter", append([]string{"--net=" + ts.Getenv(args[0]), program}, args[2:]...)...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = environment(ts), ts.MkAbs("."), log, log
	ts.Check(cmd.Start()) // and nsenter becomes the program
	s.closer = append(s.closer, func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if text, err := os.ReadFile(log.Name()); err == nil && s.t.Failed() {
			s.t.Logf("%s:\n%s", args[1], text[max(0, len(text)-3000):])
		}
		log.Close()
	})
}
