package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

// Commands about the pod network of the lab's only cluster.
//
//	break-agents ROUNDS   agents of random nodes are killed, and their pods deleted; each time the agents
//	                      come back and are ready
//	docs FILE NAME…       write the blocks of a page of docs that <!-- run: NAME --> precedes into files of these names
//	churn PODS            pods come and go on the workers, while agents, kubelets and containerds of random
//	                      workers are killed; at the end no pod is left
func init() {
	commands["break-agents"] = cmdBreakAgents
	commands["churn"] = cmdChurn
	commands["docs"] = cmdDocs
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
