package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// Commands about the pod network of the lab's only cluster.
//
//	talk FROM TO N        N TCP connections from one pod to another, on each of which a few bytes go there and
//	                      back all the time, until the scenario ends; the test does so itself, in the pods' network
//	                      namespaces, so that it depends on nothing but the network
//	talk-lives PAUSE      all of them live, moved on since the last time, and none waited longer than PAUSE
//	break-agents ROUNDS   agents of random nodes are killed, and their pods deleted; each time the agents
//	                      come back and are ready
//	docs FILE NAME…       write the blocks of a page of docs that <!-- run: NAME --> precedes into files of these names
//	churn PODS            pods come and go on the workers, while agents, kubelets and containerds of random
//	                      workers are killed; at the end no pod is left
func init() {
	commands["talk"] = cmdTalk
	commands["talk-lives"] = cmdTalkLives
	commands["break-agents"] = cmdBreakAgents
	commands["churn"] = cmdChurn
	commands["docs"] = cmdDocs
}

// talk is a number of connections between two pods.
type talk struct {
	rounds  []atomic.Int64
	seen    []int64 // of rounds, at the last look
	longest atomic.Int64
	failed  atomic.Pointer[error]
	stopped atomic.Bool
	close   []func()
	done    sync.WaitGroup
}

// silence is when a connection is given up that nobody has closed.
const silence = 2 * time.Minute

func cmdTalk(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: talk FROM TO N")
	}
	n, err := strconv.Atoi(args[2])
	ts.Check(err)
	from, _ := podNamespace(ts, args[0])
	to, address := podNamespace(ts, args[1])
	t := &talk{rounds: make([]atomic.Int64, n), seen: make([]int64, n)}
	s := sessionOf(ts)
	s.talks = append(s.talks, t)
	var listener net.Listener
	ts.Check(inside(to, func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
		return err
	}))
	t.close = append(t.close, func() { listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	ts.Check(inside(from, func() error {
		for i := range n {
			c, err := net.DialTimeout("tcp", listener.Addr().String(), 10*time.Second)
			if err != nil {
				return err
			}
			t.close = append(t.close, func() { c.Close() })
			t.done.Add(1)
			go t.converse(c, &t.rounds[i])
		}
		return nil
	}))
}

func (t *talk) converse(c net.Conn, rounds *atomic.Int64) {
	defer t.done.Done()
	b := make([]byte, 64)
	for !t.stopped.Load() {
		began := time.Now()
		_ = c.SetDeadline(began.Add(silence))
		_, err := c.Write(b)
		if err == nil {
			_, err = io.ReadFull(c, b)
		}
		if err != nil {
			if !t.stopped.Load() {
				t.failed.CompareAndSwap(nil, &err)
			}
			return
		}
		took := int64(time.Since(began))
		for longest := t.longest.Load(); took > longest && !t.longest.CompareAndSwap(longest, took); {
			longest = t.longest.Load()
		}
		rounds.Add(1)
		time.Sleep(20 * time.Millisecond)
	}
}

func (t *talk) end() {
	if t.stopped.Swap(true) {
		return
	}
	for _, f := range t.close {
		f()
	}
	t.done.Wait()
}

func cmdTalkLives(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: talk-lives PAUSE")
	}
	pause := duration(ts, args[0])
	s := sessionOf(ts)
	for _, t := range s.talks {
		still := func() int {
			n := 0
			for i := range t.rounds {
				if t.rounds[i].Load() == t.seen[i] {
					n++
				}
			}
			return n
		}
		for began := time.Now(); still() > 0 && t.failed.Load() == nil && time.Since(began) < pause; {
			time.Sleep(20 * time.Millisecond)
		}
		if err := t.failed.Load(); err != nil {
			ts.Fatalf("a connection is lost: %v", *err)
		}
		if n := still(); n > 0 {
			ts.Fatalf("%d of %d connections are silent", n, len(t.rounds))
		}
		var rounds int64
		for i := range t.rounds {
			t.seen[i] = t.rounds[i].Load()
			rounds += t.seen[i]
		}
		longest := time.Duration(t.longest.Swap(0))
		ts.Logf("%d connections, %d times there and back, the longest took %v", len(t.rounds), rounds, longest.Round(time.Microsecond))
		if longest > pause {
			ts.Fatalf("a connection was silent for %v", longest)
		}
	}
}

func cmdDocs(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: docs FILE NAME…")
	}
	page, err := os.ReadFile("../../docs/" + args[0])
	ts.Check(err)
	for _, name := range args[1:] {
		_, block, found := strings.Cut(string(page), "<!-- run: "+name+" -->\n```sh\n")
		block, _, ended := strings.Cut(block, "```\n")
		if !found || !ended {
			ts.Fatalf("%s has no block %q", args[0], name)
		}
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(block), 0o644))
	}
}

// inside runs f in a network namespace. Sockets that it opens there stay there; it must start no goroutine.
func inside(namespace string, f func() error) error {
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // and the thread ends with the goroutine
		file, err := os.Open(namespace)
		if err == nil {
			err = unix.Setns(int(file.Fd()), unix.CLONE_NEWNET)
			file.Close()
		}
		if err == nil {
			err = f()
		}
		failed <- err
	}()
	return <-failed
}

// podNamespace finds the network namespace of a pod by its address.
func podNamespace(ts *testscript.TestScript, pod string) (namespace, address string) {
	where := strings.Fields(say(ts, "fathom", "kubectl", "--", "get", "pod", pod, "-o", "jsonpath={.spec.nodeName} {.status.podIP}"))
	if len(where) != 2 {
		ts.Fatalf("pod %s has no node or no address", pod)
	}
	node, address := where[0], where[1]
	for _, n := range nodesOf(ts) {
		if n.Name != node {
			continue
		}
		for _, file := range glob(fmt.Sprintf("/proc/%d/root/run/netns/*", n.Pid)) {
			found := errors.New("another pod")
			_ = inside(file, func() error {
				addrs, err := net.InterfaceAddrs()
				for _, a := range addrs {
					if ip, _, _ := net.ParseCIDR(a.String()); ip.String() == address {
						found = nil
					}
				}
				return err
			})
			if found == nil {
				return file, address
			}
		}
	}
	ts.Fatalf("no namespace of pod %s with address %s on node %s", pod, address, node)
	return "", ""
}

type labNode struct {
	Name, Role string
	Pid        int
}

func nodesOf(ts *testscript.TestScript) []labNode {
	var nodes []labNode
	ts.Check(json.Unmarshal([]byte(say(ts, "fathom", "node", "ls", "-o", "json")), &nodes))
	return nodes
}

// say runs a command of a scenario, which has to succeed, and returns what it prints.
func say(ts *testscript.TestScript, argv ...string) string {
	stdout, stderr, err := try(ts, commandTimeout, argv)
	if err != nil {
		ts.Fatalf("%s: %v\n%s%s", strings.Join(argv, " "), err, stdout, stderr)
	}
	return stdout
}

// random returns a source whose seed is in the log; $FATHOM_SEED repeats an earlier one.
func random(ts *testscript.TestScript) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("FATHOM_SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		ts.Check(err)
	}
	ts.Logf("FATHOM_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// kill ends a program of a node without warning.
func kill(ts *testscript.TestScript, node, program string) {
	// By name, but in the node's own process namespace. That none is there is not an error.
	_, _, _ = try(ts, commandTimeout, []string{"on", node, "pkill", "-KILL", "-x", program})
	ts.Logf("killed %s on %s", program, node)
}

// await fails the scenario unless a command succeeds within the time.
func await(ts *testscript.TestScript, limit time.Duration, argv ...string) {
	for began := time.Now(); ; time.Sleep(200 * time.Millisecond) {
		stdout, stderr, err := try(ts, limit, argv)
		if err == nil {
			return
		}
		if time.Since(began) > limit {
			ts.Fatalf("%s: not within %v: %v\n%s%s", strings.Join(argv, " "), limit, err, stdout, stderr)
		}
	}
}

func cmdBreakAgents(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: break-agents ROUNDS")
	}
	rounds, err := strconv.Atoi(args[0])
	ts.Check(err)
	r, nodes := random(ts), nodesOf(ts)
	for i := range rounds {
		if i%2 == 1 { // by turns, since kubelet waits longer each time before it starts the same container again
			say(ts, "fathom", "kubectl", "--", "-n", "fathom-system", "delete", "pods", "--all", "--grace-period=1")
		}
		r.Shuffle(len(nodes), func(i, j int) { nodes[i], nodes[j] = nodes[j], nodes[i] })
		for _, n := range nodes[:1+r.IntN(len(nodes))] {
			kill(ts, n.Name, "fathom-agent")
		}
		for _, n := range nodes {
			await(ts, 90*time.Second, "on", n.Name, "curl", "-sSf", "http://127.0.0.1:10470/readyz")
		}
	}
}

func cmdChurn(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: churn PODS")
	}
	pods, err := strconv.Atoi(args[0])
	ts.Check(err)
	r := random(ts)
	workers := slices.DeleteFunc(nodesOf(ts), func(n labNode) bool { return n.Role != "worker" })
	const batch, most = 10, 60 // a node has room for 110 pods
	var there []string
	remove := func(n int) {
		r.Shuffle(len(there), func(i, j int) { there[i], there[j] = there[j], there[i] })
		n = min(n, len(there))
		if n <= 0 {
			return
		}
		argv := []string{"fathom", "kubectl", "--", "delete", "pods", "--wait=false"}
		if r.IntN(2) == 0 {
			argv = append(argv, "--force", "--grace-period=0") // the API forgets them before their node does
		}
		say(ts, append(argv, there[:n]...)...)
		there = there[n:]
	}
	for made := 0; made < pods; {
		var manifest strings.Builder
		for range min(batch, pods-made) {
			name := fmt.Sprintf("churn-%d", made)
			fmt.Fprintf(&manifest, churnPod, name, workers[r.IntN(len(workers))].Name)
			there = append(there, name)
			made++
		}
		file := ts.MkAbs(".churn.yaml")
		ts.Check(os.WriteFile(file, []byte(manifest.String()), 0o644))
		say(ts, "fathom", "kubectl", "--", "create", "-f", file)
		time.Sleep(time.Duration(r.IntN(1500)) * time.Millisecond) // a random moment of their start
		if r.IntN(3) > 0 {
			program := []string{"fathom-agent", "kubelet", "containerd", "fathom-cni"}[r.IntN(4)]
			kill(ts, workers[r.IntN(len(workers))].Name, program)
		}
		remove(r.IntN(batch))
		remove(len(there) - most)
	}
	say(ts, "fathom", "kubectl", "--", "delete", "pods", "-l", "app=churn", "--timeout=120s")
}

const churnPod = `---
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: churn}}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 0
  containers: [{name: box, image: "toolbox:1"}]
`
