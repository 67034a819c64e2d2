package cni_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/fathom-network/fathom/internal/cni"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

func addressesOf(r *types100.Result) (all []netip.Addr) {
	for _, ip := range r.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		all = append(all, a.Unmap())
	}
	return all
}

// TestLostLeases: people empty the directory of leases, or remove it, on a node that has pods. Nobody's address, route or
// device goes, whoever comes first: an ADD, a DEL, a CHECK, a GC, or the agent's sweep.
func TestLostLeases(t *testing.T) {
	dirs := func(n *node, names ...string) (files []string) {
		for _, d := range names {
			found, err := filepath.Glob(filepath.Join(n.conf["dataDir"].(string), d, "*"))
			testenv.Must(t, err)
			files = append(files, found...)
		}
		return files
	}
	losses := map[string]func(n *node) []string{
		"the directory": func(n *node) []string { return []string{n.conf["dataDir"].(string)} },
		"all files": func(n *node) []string {
			return append(dirs(n, "addresses", "attachments", "cooling"), filepath.Join(n.conf["dataDir"].(string), "last"))
		},
		"attachments": func(n *node) []string { return dirs(n, "attachments") },
		"addresses": func(n *node) []string {
			return append(dirs(n, "addresses"), filepath.Join(n.conf["dataDir"].(string), "last"))
		},
		"one lease": func(n *node) []string {
			return append(dirs(n, "a*/10.244.1.2", "a*/fd00*:2", "attachments"), filepath.Join(n.conf["dataDir"].(string), "last"))[:3]
		},
	}
	for loss, of := range losses {
		for _, first := range []string{"ADD", "DEL", "CHECK", "GC", "GC of the others", "sweep"} {
			t.Run(loss+", then "+first, func(t *testing.T) {
				n := newNode(t)
				n.conf["coolDown"] = "1h"
				pods := []pod{newPod(t, "aaaa-0"), newPod(t, "bbbb-0"), newPod(t, strings.Repeat("x", 253))} // of which the alias is cut
				var results []*types100.Result
				for _, p := range pods {
					r, e := n.call(t, "ADD", p, nil)
					if e != nil {
						t.Fatal(e)
					}
					results = append(results, r)
				}
				reached := func(from int) {
					t.Helper()
					for _, r := range results[from:] {
						for _, a := range addressesOf(r) {
							testenv.Must(t, ping(n.Namespace, a, 56))
						}
					}
				}
				lost := of(n)
				if len(lost) == 0 {
					t.Fatal("nothing is lost")
				}
				for _, path := range lost {
					testenv.Must(t, os.RemoveAll(path))
				}
				left := 0 // pods that were detached
				switch first {
				case "DEL":
					if _, e := n.call(t, "DEL", pods[0], nil); e != nil {
						t.Fatal(e)
					}
					gone(t, n, pods[0])
					left = 1
				case "CHECK":
					if _, e := n.call(t, "CHECK", pods[0], map[string]any{"prevResult": results[0]}); e != nil {
						t.Errorf("CHECK: %v", e)
					}
				case "GC":
					if _, e := n.call(t, "GC", pod{}, nil); e != nil {
						t.Fatal(e)
					}
				case "GC of the others":
					if _, e := n.call(t, "GC", pod{}, map[string]any{"cni.dev/valid-attachments": []any{
						map[string]any{"containerID": containerID(pods[1]), "ifname": "eth0"},
						map[string]any{"containerID": containerID(pods[2]), "ifname": "eth0"},
					}}); e != nil {
						t.Fatal(e)
					}
					gone(t, n, pods[0])
					left = 1
				case "sweep":
					s, err := lease.Open(n.conf["dataDir"].(string), 0)
					testenv.Must(t, err)
					swept, err := cni.Sweep(n.Namespace, s, n.network(), func(_ lease.Lease, present bool) bool { return present })
					if err != nil || len(swept.Rebuilt) == 0 || len(swept.Leases) != 0 || len(swept.Kept) != 3 {
						t.Errorf("swept %+v, %v", swept, err)
					}
					for _, l := range swept.Rebuilt {
						if l.Pool != "default" || l.Network != "fathom" || l.PodNamespace != "default" || l.IfName != "eth0" {
							t.Errorf("rebuilt %+v", l)
						}
					}
				}
				reached(left)
				// Newcomers get other addresses.
				for _, name := range []string{"cccc-0", "dddd-0"} {
					p := newPod(t, name)
					r, e := n.call(t, "ADD", p, nil)
					if e != nil {
						t.Fatal(e)
					}
					for _, other := range results {
						if slices.ContainsFunc(addressesOf(r), func(a netip.Addr) bool { return slices.Contains(addressesOf(other), a) }) {
							t.Fatalf("%s gets %v, and %v is of a pod that is there or has just gone", name, addressesOf(r), addressesOf(other))
						}
					}
					pods, results = append(pods, p), append(results, r)
				}
				reached(left)
				for i, p := range pods {
					if i < left {
						continue
					}
					if _, e := n.call(t, "CHECK", p, map[string]any{"prevResult": results[i]}); e != nil {
						t.Errorf("CHECK of %.9s: %v", p.name, e)
					}
					for range 2 {
						if _, e := n.call(t, "DEL", p, nil); e != nil {
							t.Errorf("DEL of %.9s: %v", p.name, e)
						}
					}
					gone(t, n, p)
					reached(i + 1)
				}
				n.clean(t)
				for _, r := range results { // and rest
					for _, a := range addressesOf(r) {
						if len(resting(t, n, a)) == 0 {
							t.Errorf("%s does not rest", a)
						}
					}
				}
			})
		}
	}
}

// resting are the files that say that an address rests.
func resting(t *testing.T, n *node, a netip.Addr) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(n.conf["dataDir"].(string), "cooling", a.String()+"@*"))
	testenv.Must(t, err)
	return files
}

// TestNameInTheWay: a device of the name that a pod's is to have is another pod's, or foreign. It stays.
func TestNameInTheWay(t *testing.T) {
	n := newNode(t)
	p := newPod(t, "web-1")
	old, e := n.call(t, "ADD", p, nil)
	if e != nil {
		t.Fatal(e)
	}
	testenv.Must(t, os.RemoveAll(n.conf["dataDir"].(string)))
	again := newPod(t, "web-1") // the same container, in another namespace
	r, e := n.call(t, "ADD", again, nil)
	if e != nil {
		t.Fatal(e)
	}
	for _, a := range slices.Concat(addressesOf(old), addressesOf(r)) {
		testenv.Must(t, ping(n.Namespace, a, 56))
	}
	// A foreign device has taken the name since.
	host := r.Interfaces[0].Name
	for _, args := range [][]string{{"ip", "link", "del", host}, {"ip", "link", "add", host, "type", "veth", "peer", "name", "x0"}} {
		linktest.Run(t, n.Namespace, args...)
	}
	for range 2 { // of the lease of each
		if _, e := n.call(t, "DEL", again, nil); e != nil {
			t.Error(e)
		}
	}
	if _, err := n.Device(host); err != nil {
		t.Errorf("the foreign device went: %v", err)
	}
	n.clean(t)
}

// TestRelease: the pod that has the address is cut off, or its lease would be made again.
func TestRelease(t *testing.T) {
	n := newNode(t)
	p := newPod(t, "web-0")
	r, e := n.call(t, "ADD", p, nil)
	if e != nil {
		t.Fatal(e)
	}
	for range 2 {
		testenv.Must(t, cni.Release(n.Namespace, n.store(t), addressesOf(r)[1]))
		gone(t, n, p)
		n.clean(t)
	}
}
