package cni_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/fathom-network/fathom/internal/cni"
	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

var programDir string // empty as long as no test needs it

// program is fathom-cni, built once.
var program = sync.OnceValues(func() (string, error) {
	var err error
	if programDir, err = os.MkdirTemp("", "fathom-cni"); err != nil {
		return "", err
	}
	path := filepath.Join(programDir, conflist.Plugin)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "github.com/fathom-network/fathom/cmd/fathom-cni")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build fathom-cni: %w\n%s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	if asPlugin() {
		return
	}
	code := m.Run()
	if programDir != "" {
		os.RemoveAll(programDir)
	}
	os.Exit(code)
}

const kit = "../../bin/kit"

// node is a namespace that stands for a node, with what the plugin needs there.
type node struct {
	*link.Namespace
	dir  string
	conf map[string]any // fathom-cni's part of the conflist
}

var nodeAddresses = []string{"10.201.1.3", "fd00:201::3"}

func newNode(t testing.TB) *node {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedFile(t, kit+"/bin/cnitool", "run `make kit`")
	n := &node{Namespace: linktest.Namespace(t), dir: t.TempDir()}
	n.conf = map[string]any{
		"type": conflist.Plugin, "mtu": 1450, "nodeAddresses": nodeAddresses,
		"pools":   []any{map[string]any{"name": "default", "ranges": []string{"10.244.1.0/24", "fd00:10:244:1::/64"}}},
		"dataDir": filepath.Join(n.dir, "leases"), "coolDown": "0s",
		"capabilities": map[string]bool{"ips": true, "mac": true},
	}
	testenv.Must(t, n.SetUp("lo", true))
	var own []netip.Prefix
	for _, s := range nodeAddresses {
		a := netip.MustParseAddr(s)
		own = append(own, netip.PrefixFrom(a, a.BitLen()))
	}
	testenv.Must(t, n.SetAddrs("lo", own))
	for _, d := range []string{"lib", "net.d"} {
		testenv.Must(t, os.Mkdir(filepath.Join(n.dir, d), 0o755))
	}
	return n
}

// pod is a namespace that stands for a pod.
type pod struct {
	*link.Namespace
	path, name string
}

func newPod(t testing.TB, name string) pod {
	t.Helper()
	n, path := linktest.NamespaceAt(t)
	return pod{n, path, name}
}

// ping says whether a packet of that size gets there, unfragmented, and comes back.
func ping(n *link.Namespace, to netip.Addr, size int) error {
	out, err := linktest.Try(n, "ping", "-c1", "-W2", "-M", "do", "-s", fmt.Sprint(size), to.String())
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// write writes the conflist: our plugin, and the ones behind it.
func (n *node) write(t testing.TB, version string, behind ...any) {
	t.Helper()
	data, err := json.Marshal(map[string]any{"cniVersion": version, "name": "fathom", "plugins": append([]any{n.conf}, behind...)})
	testenv.Must(t, err)
	testenv.Must(t, os.WriteFile(filepath.Join(n.dir, "net.d", "10-fathom.conflist"), data, 0o644))
}

// cnitool runs the runtime's side as it is. It keeps results in /var/lib/cni, which is a directory of the test here.
func (n *node) cnitool(t testing.TB, p pod, env []string, args ...string) (string, error) {
	t.Helper()
	plugin, err := program()
	testenv.Must(t, err)
	tool, err := filepath.Abs(kit)
	testenv.Must(t, err)
	cmd := exec.Command("sh", append([]string{"-c", `mount --bind "$0" /var/lib && exec "$@"`, filepath.Join(n.dir, "lib"), tool + "/bin/cnitool"}, args...)...)
	if p.path != "" {
		cmd.Args = append(cmd.Args, p.path)
	}
	cmd.Env = append(os.Environ(), "CNI_PATH="+filepath.Dir(plugin)+":"+tool+"/cni", "NETCONFPATH="+filepath.Join(n.dir, "net.d"))
	if p.name != "" {
		cmd.Env = append(cmd.Env, "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME="+p.name+";K8S_POD_UID=u-"+p.name)
	}
	cmd.Env = append(cmd.Env, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	testenv.Must(t, n.Start(cmd))
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("cnitool %q: %w: %s%s", args, err, out.String(), stderr.String())
	}
	return out.String(), nil
}

// command is a call of the plugin itself, in the node's namespace.
func (n *node) command(t testing.TB, command string, p pod, more map[string]any) *exec.Cmd {
	t.Helper()
	plugin, err := program()
	testenv.Must(t, err)
	in := maps.Clone(n.conf)
	in["cniVersion"], in["name"] = "1.1.0", "fathom"
	maps.Copy(in, more)
	data, err := json.Marshal(in)
	testenv.Must(t, err)
	cmd := exec.Command(plugin)
	cmd.Env = []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + containerID(p), "CNI_IFNAME=eth0", "CNI_NETNS=" + p.path, "CNI_PATH=/",
		"CNI_ARGS=K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + p.name,
	}
	cmd.Stdin = bytes.NewReader(data)
	cmd.Stdout = &bytes.Buffer{}
	return cmd
}

func containerID(p pod) string { return "container-" + p.name }

// call runs the plugin and returns its result, or its error.
func (n *node) call(t testing.TB, command string, p pod, more map[string]any) (*types100.Result, *types.Error) {
	t.Helper()
	cmd := n.command(t, command, p, more)
	testenv.Must(t, n.Start(cmd))
	err := cmd.Wait()
	out := cmd.Stdout.(*bytes.Buffer).Bytes()
	if err != nil {
		var e types.Error
		if json.Unmarshal(out, &e) != nil || e.Code == 0 {
			t.Fatalf("%s fails with %v and no error by the specification: %s", command, err, out)
		}
		return nil, &e
	}
	if command != "ADD" {
		return nil, nil
	}
	var r types100.Result
	testenv.Must(t, json.Unmarshal(out, &r))
	return &r, nil
}

func (n *node) store(t testing.TB) *lease.Store {
	t.Helper()
	s, err := lease.Open(n.conf["dataDir"].(string), 0)
	testenv.Must(t, err)
	return s
}

// network is the node's network as an agent knows it.
func (n *node) network() cni.Network {
	return cni.Network{Name: "fathom", Namespaces: "/run/netns", Pools: func() []ipam.Pool {
		return []ipam.Pool{{Name: "default", Ranges: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")}}}
	}}
}

// clean fails if anything is left of any pod.
func (n *node) clean(t testing.TB) {
	t.Helper()
	devices, err := podlink.Devices(n.Namespace)
	if err != nil || len(devices) > 0 {
		t.Errorf("left devices %v, %v", devices, err)
	}
	for _, f := range []string{"-4", "-6"} {
		if out, err := linktest.Try(n.Namespace, "ip", f, "route", "show", "proto", "252"); err != nil || out != "" {
			t.Errorf("left routes: %s%v", out, err)
		}
	}
	for _, d := range []string{"addresses", "attachments"} {
		files, err := os.ReadDir(filepath.Join(n.conf["dataDir"].(string), d))
		if err != nil || len(files) > 0 {
			t.Errorf("left leases %v, %v", files, err)
		}
	}
}

// TestVersions attaches two pods with each version of the specification, through cnitool and with the reference
// plugins behind ours, and lets them talk.
func TestVersions(t *testing.T) {
	behind := []any{
		map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}},
		map[string]any{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}},
		map[string]any{"type": "tuning", "sysctl": map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}},
		map[string]any{"type": "firewall"}, // speaks no 0.3.1
	}
	for _, version := range []string{"1.1.0", "1.0.0", "0.4.0", "0.3.1"} {
		t.Run(version, func(t *testing.T) {
			n := newNode(t)
			if version == "0.3.1" {
				behind = behind[:len(behind)-1]
			}
			n.write(t, version, behind...)
			a, b := newPod(t, "web-7db6d8ff4d-abcde"), newPod(t, "")
			var addresses [][]netip.Addr
			for _, p := range []pod{a, b} {
				out, err := n.cnitool(t, p, []string{`CAP_ARGS={"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}],"bandwidth":{"ingressRate":1000000000,"ingressBurst":100000000}}`}, "add", "fathom")
				testenv.Must(t, err)
				addresses = append(addresses, validate(t, n, p, version, out))
			}
			for i, from := range []pod{a, b} {
				for _, to := range append(slices.Clone(addresses[1-i]), netip.MustParseAddr(nodeAddresses[0]), netip.MustParseAddr(nodeAddresses[1])) {
					header := 28 // of IP and ICMP
					if to.Is6() {
						header = 48
					}
					testenv.Must(t, ping(from.Namespace, to, 1450-header))
					if i == 0 && to.String() == nodeAddresses[i] && ping(from.Namespace, to, 1450-header+1) == nil {
						t.Errorf("a packet larger than the MTU gets to %s", to)
					}
				}
				for _, to := range addresses[i] {
					testenv.Must(t, ping(n.Namespace, to, 56))
					out, err := linktest.Try(n.Namespace, "ip", "route", "get", to.String())
					want := nodeAddresses[0]
					if to.Is6() {
						want = nodeAddresses[1]
					}
					if err != nil || !strings.Contains(out, "src "+want) {
						t.Errorf("the node talks to %s so: %s", to, out)
					}
				}
			}
			if version != "0.3.1" { // which has no CHECK
				_, err := n.cnitool(t, a, nil, "check", "fathom")
				testenv.Must(t, err)
				breaks(t, n, a, addresses[0], version)
			}
			for range 2 {
				for _, p := range []pod{a, b} {
					_, err := n.cnitool(t, p, nil, "del", "fathom")
					testenv.Must(t, err)
				}
			}
			n.clean(t)
		})
	}
}

// validate reads a result as the runtime does, and compares it with the namespace.
func validate(t *testing.T, n *node, p pod, version, out string) []netip.Addr {
	t.Helper()
	read, err := create.Create(version, []byte(out))
	testenv.Must(t, err)
	r, err := types100.GetResult(read)
	testenv.Must(t, err)
	if read.Version() != version || len(r.IPs) != 2 || len(r.Routes) != 4 {
		t.Fatalf("result %s", out)
	}
	var ours, host *types100.Interface
	var addresses []netip.Addr
	for _, ip := range r.IPs {
		ours = r.Interfaces[*ip.Interface]
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		a = a.Unmap()
		ones, bits := ip.Address.Mask.Size()
		if ones != bits || !ip.Gateway.Equal(podlink.Gateway(a).AsSlice()) {
			t.Errorf("address %v", ip)
		}
		addresses = append(addresses, a)
	}
	for _, i := range r.Interfaces {
		if i.Sandbox == "" && i.Name != "bwp" && strings.Contains(i.Name, "-") {
			host = i
		}
	}
	if ours.Name != "eth0" || ours.Sandbox != p.path || host == nil {
		t.Fatalf("result %s", out)
	}
	in, err := linktest.Try(p.Namespace, "ip", "-d", "link", "show", "eth0")
	testenv.Must(t, err)
	on, err := linktest.Try(n.Namespace, "ip", "-d", "link", "show", host.Name)
	testenv.Must(t, err)
	name, alias := "web-7db6-", "alias fathom pod default/"+p.name+" eth0"
	if p.name == "" {
		name, alias = "pod-", "alias fathom container cnitool-"
	}
	if !strings.Contains(in, ours.Mac) || !strings.Contains(in, "mtu 1450") || !strings.Contains(on, host.Mac) || !strings.Contains(on, "mtu 1450") ||
		!strings.Contains(on, "group 252") || !strings.Contains(on, alias) || !strings.HasPrefix(host.Name, name) || len(host.Name) > 15 {
		t.Errorf("result %s\nnode: %s\npod: %s", out, on, in)
	}
	if tentative, err := linktest.Try(p.Namespace, "ip", "-6", "addr", "show", "tentative"); err != nil || strings.TrimSpace(tentative) != "" {
		t.Errorf("IPv6 is not usable at once: %s %v", tentative, err)
	}
	if lo, err := linktest.Try(p.Namespace, "ping", "-c1", "-W1", "127.0.0.1"); err != nil {
		t.Errorf("lo is down: %s", lo)
	}
	return addresses
}

// breaks takes one thing away at a time; CHECK says which.
func breaks(t *testing.T, n *node, p pod, addresses []netip.Addr, version string) {
	t.Helper()
	devices, err := podlink.Devices(n.Namespace)
	testenv.Must(t, err)
	host := devices[slices.IndexFunc(devices, func(d podlink.Device) bool { return strings.Contains(d.Alias, p.name) })].Name
	a4, a6 := addresses[0].String(), addresses[1].String()
	for _, test := range []struct {
		in            *link.Namespace
		undo, restore []string
		want          string
	}{
		{n.Namespace, []string{"ip", "route", "del", a4}, []string{"ip", "route", "add", a4, "dev", host}, "no route to " + a4},
		{n.Namespace, []string{"ip", "-6", "neigh", "del", a6, "dev", host}, []string{"ip", "-6", "neigh", "add", a6, "lladdr", "02:00:00:00:00:01", "nud", "permanent", "dev", host}, "no permanent neighbour " + a6},
		{p.Namespace, []string{"ip", "route", "del", "default"}, []string{"ip", "route", "add", "default", "via", "169.254.1.1"}, "no route to 0.0.0.0/0 via 169.254.1.1"},
		{p.Namespace, []string{"ip", "link", "set", "eth0", "mtu", "1400"}, []string{"ip", "link", "set", "eth0", "mtu", "1450"}, "MTU"},
		{p.Namespace, []string{"ip", "addr", "del", a6 + "/128", "dev", "eth0"}, nil, "does not have the address " + a6},
	} {
		out, err := linktest.Try(test.in, test.undo...)
		if err != nil {
			t.Fatalf("%q: %v %s", test.undo, err, out)
		}
		if _, err := n.cnitool(t, p, nil, "check", "fathom"); err == nil || !strings.Contains(err.Error(), test.want) {
			if version != "0.4.0" || test.want != "MTU" { // whose results do not tell it
				t.Errorf("after %q CHECK gives %v", test.undo, err)
			}
		}
		if len(test.restore) > 0 {
			out, err := linktest.Try(test.in, test.restore...)
			if err != nil {
				t.Fatalf("%q: %v %s", test.restore, err, out)
			}
		}
	}
}

func TestErrors(t *testing.T) {
	n := newNode(t)
	p, q := newPod(t, "web-0"), newPod(t, "web-1")
	fails := func(what string, e *types.Error, code uint, message string) {
		t.Helper()
		if e == nil || e.Code != code || !strings.Contains(e.Error(), message) {
			t.Errorf("%s gives %+v, want code %d and %q", what, e, code, message)
		}
	}
	r, e := n.call(t, "ADD", p, map[string]any{"dns": map[string]any{"nameservers": []string{"10.96.0.10"}}})
	if e != nil || len(r.DNS.Nameservers) != 1 {
		t.Fatalf("%+v, %v", r, e)
	}
	_, e = n.call(t, "ADD", p, nil)
	fails("a second ADD", e, types.ErrInvalidEnvironmentVariables, "attached already")
	_, e = n.call(t, "CHECK", p, nil)
	fails("CHECK without prevResult", e, types.ErrInvalidNetworkConfig, "prevResult")
	_, e = n.call(t, "CHECK", p, map[string]any{"prevResult": r})
	if e != nil {
		t.Errorf("CHECK gives %v", e)
	}
	_, e = n.call(t, "CHECK", q, map[string]any{"prevResult": r})
	fails("CHECK of another", e, 100, "no lease")
	_, e = n.call(t, "ADD", pod{path: "/nonexistent", name: "x"}, nil)
	fails("no namespace", e, types.ErrInvalidNetNS, "/nonexistent")
	_, e = n.call(t, "ADD", pod{path: "/proc/self/ns/net", name: "x"}, nil)
	fails("the node's namespace", e, types.ErrInvalidNetNS, "own")
	_, e = n.call(t, "ADD", q, map[string]any{"pools": []any{}})
	fails("no pools", e, types.ErrTryAgainLater, "podCIDRs")
	_, e = n.call(t, "ADD", q, map[string]any{"mtu": -1, "coolDown": "x"})
	fails("a bad configuration", e, types.ErrInvalidNetworkConfig, "coolDown")
	_, e = n.call(t, "ADD", q, map[string]any{"prevResult": 1})
	fails("a bad prevResult", e, types.ErrDecodingFailure, "")
	_, e = n.call(t, "ADD", q, map[string]any{"nodeAddresses": []string{"10.99.0.1", "fd00:99::1"}})
	fails("an address that the node has not", e, types.ErrInternal, "is 10.99.0.1 an address of this node?")
	_, e = n.call(t, "ADD", q, map[string]any{"runtimeConfig": map[string]any{"ips": []string{r.IPs[0].Address.String()}}})
	fails("an address of another", e, types.ErrTryAgainLater, "in use")
	pools := []any{map[string]any{"name": "small", "ranges": []string{"10.5.0.4/32"}}}
	small, e := n.call(t, "ADD", q, map[string]any{"pools": pools})
	if e != nil || small.IPs[0].Address.String() != "10.5.0.4/32" {
		t.Fatalf("%+v, %v", small, e)
	}
	third := newPod(t, "third")
	_, e = n.call(t, "ADD", third, map[string]any{"pools": pools})
	fails("a full pool", e, types.ErrTryAgainLater, `pool "small" has no free IPv4 address on this node: 1 of 1 in use, 0 cooling down`)
	// The pod has a device of that name: it stays, and nothing of ours does.
	out, err := linktest.Try(third.Namespace, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "x0")
	if err != nil {
		t.Fatal(out)
	}
	_, e = n.call(t, "ADD", third, nil)
	fails("a device in the way", e, types.ErrInvalidEnvironmentVariables, "eth0 already")
	r, e = n.call(t, "ADD", newPod(t, "fixed"), map[string]any{"runtimeConfig": map[string]any{"ips": []string{"10.244.1.77/24"}, "mac": "02:11:22:33:44:55"}})
	if e != nil || r.IPs[0].Address.String() != "10.244.1.77/32" || r.Interfaces[1].Mac != "02:11:22:33:44:55" {
		t.Errorf("%+v, %v", r, e)
	}
	for _, name := range []string{"web-0", "web-1", "third", "fixed", "never-there"} {
		// With the namespace gone, and with a configuration that has become bad.
		if _, e := n.call(t, "DEL", pod{path: "", name: name}, map[string]any{"mtu": -1}); e != nil {
			t.Errorf("DEL gives %v", e)
		}
	}
	n.clean(t)
}

// TestPodGone: the namespace went without a DEL, and the device with it.
func TestPodGone(t *testing.T) {
	n := newNode(t)
	path := filepath.Join(t.TempDir(), "ns")
	testenv.Must(t, link.Create(path))
	if _, e := n.call(t, "ADD", pod{path: path, name: "web-0"}, nil); e != nil {
		t.Fatal(e)
	}
	testenv.Must(t, link.Delete(path))
	for range 2 {
		if _, e := n.call(t, "DEL", pod{path: path, name: "web-0"}, nil); e != nil {
			t.Error(e)
		}
	}
	n.clean(t)
}

func TestStatusAndGC(t *testing.T) {
	n := newNode(t)
	n.write(t, "1.1.0")
	_, err := n.cnitool(t, pod{}, nil, "status", "fathom", "x")
	testenv.Must(t, err)
	if _, e := n.call(t, "STATUS", pod{}, map[string]any{"pools": []any{}}); e == nil || e.Code != types.ErrPluginNotAvailable {
		t.Errorf("without ranges STATUS gives %v", e)
	}
	full := []any{map[string]any{"name": "small", "ranges": []string{"10.5.0.4/32"}}}
	if _, e := n.call(t, "ADD", newPod(t, "full"), map[string]any{"pools": full}); e != nil {
		t.Fatal(e)
	}
	if _, e := n.call(t, "STATUS", pod{}, map[string]any{"pools": full}); e != nil {
		t.Errorf("with a full pool STATUS gives %v", e)
	}
	stays := newPod(t, "stays")
	if _, e := n.call(t, "ADD", stays, nil); e != nil {
		t.Fatal(e)
	}
	valid := []any{map[string]any{"containerID": containerID(stays), "ifname": "eth0"}}
	// A device that no lease has, one of another network, and one that is nobody's.
	for _, d := range [][2]string{{"stray-1", "fathom pod default/stray eth0"}, {"other-1", "other pod default/x eth0"}, {"nobody-1", ""}} {
		for _, args := range [][]string{
			{"ip", "link", "add", d[0], "group", "252", "type", "veth", "peer", "name", d[0] + "p"},
			{"ip", "link", "set", d[0], "alias", d[1]},
		} {
			if out, err := linktest.Try(n.Namespace, args...); err != nil {
				t.Fatalf("%q: %s", args, out)
			}
		}
	}
	// Without a list nothing goes, and the device gets the lease that it must have had.
	if _, e := n.call(t, "GC", pod{}, nil); e != nil {
		t.Fatal(e)
	}
	if l, err := n.store(t).List(); err != nil || len(l) != 3 {
		t.Fatalf("%v, %v", l, err)
	}
	if _, e := n.call(t, "GC", pod{}, map[string]any{"cni.dev/valid-attachments": valid}); e != nil {
		t.Fatal(e)
	}
	l, err := n.store(t).List()
	if err != nil || len(l) != 1 || l[0].PodName != "stays" {
		t.Errorf("after GC: %v, %v", l, err)
	}
	devices, err := podlink.Devices(n.Namespace)
	testenv.Must(t, err)
	names := map[string]bool{}
	for _, d := range devices {
		names[d.Name] = true
	}
	if len(names) != 3 || !names["other-1"] || !names["nobody-1"] || !names[l[0].HostDevice] {
		t.Errorf("after GC: %v", devices)
	}
	testenv.Must(t, ping(n.Namespace, l[0].Addresses[1], 56))
	_, err = n.cnitool(t, pod{}, nil, "gc", "fathom", "x")
	testenv.Must(t, err)
	if _, e := n.call(t, "GC", pod{}, map[string]any{"cni.dev/valid-attachments": []any{}}); e != nil {
		t.Fatal(e)
	}
	for _, d := range []string{"other-1", "nobody-1"} {
		_, err := linktest.Try(n.Namespace, "ip", "link", "del", d)
		testenv.Must(t, err)
	}
	n.clean(t)
}

// TestMany attaches 50 pods at once.
func TestMany(t *testing.T) {
	n := newNode(t)
	var pods []pod
	for i := range 50 {
		pods = append(pods, newPod(t, fmt.Sprintf("web-%d", i)))
	}
	all := func(command string) {
		var running []*exec.Cmd
		for _, p := range pods {
			cmd := n.command(t, command, p, nil)
			testenv.Must(t, n.Start(cmd))
			running = append(running, cmd)
		}
		for _, cmd := range running {
			if err := cmd.Wait(); err != nil {
				t.Errorf("%s: %v: %s", command, err, cmd.Stdout)
			}
		}
	}
	all("ADD")
	leases, err := n.store(t).List()
	if err != nil || len(leases) != len(pods) {
		t.Fatalf("%d leases, %v", len(leases), err)
	}
	holder := map[netip.Addr]lease.Attachment{}
	for _, l := range leases {
		for _, a := range l.Addresses {
			if other, twice := holder[a]; twice {
				t.Errorf("%s is of %s and of %s", a, other, l.Attachment)
			}
			holder[a] = l.Attachment
		}
	}
	testenv.Must(t, ping(pods[0].Namespace, leases[len(leases)-1].Addresses[0], 56))
	all("DEL")
	n.clean(t)
}

// TestKilled kills the plugin at random moments of ADD and DEL. What GC holds to be valid works on, and of the rest
// nothing is left.
func TestKilled(t *testing.T) {
	n := newNode(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	killed := map[string]int{}
	for round := range 40 {
		p := newPod(t, fmt.Sprintf("pod-%d", round))
		for _, command := range []string{"ADD", "DEL"} {
			cmd := n.command(t, command, p, nil)
			testenv.Must(t, n.Start(cmd))
			time.Sleep(time.Duration(rnd.IntN(9000)) * time.Microsecond)
			_ = cmd.Process.Kill()
			var exit *exec.ExitError
			if err := cmd.Wait(); err == nil {
				continue
			} else if !errors.As(err, &exit) || exit.Exited() {
				t.Fatalf("%s: %v: %s", command, err, cmd.Stdout)
			}
			killed[command]++
			break
		}
	}
	t.Logf("killed: %v", killed)
	valid := func(l lease.Lease, _ bool) bool { return l.PodName == "stays" }
	stays := newPod(t, "stays")
	if _, e := n.call(t, "ADD", stays, nil); e != nil {
		t.Fatal(e)
	}
	// Sweep as the agent calls it, for which this process would have to be in the node's namespace.
	swept, err := cni.Sweep(n.Namespace, n.store(t), n.network(), valid)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("swept %d leases", len(swept.Leases))
	if len(swept.Rebuilt) > 0 {
		t.Errorf("whoever was killed, no device is ever without a lease: %v", swept.Rebuilt)
	}
	leases, err := n.store(t).List()
	if err != nil || len(leases) != 1 {
		t.Fatalf("%v, %v", leases, err)
	}
	testenv.Must(t, ping(n.Namespace, leases[0].Addresses[0], 56))
	if _, e := n.call(t, "DEL", stays, nil); e != nil {
		t.Error(e)
	}
	n.clean(t)
}
