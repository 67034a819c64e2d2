package fastpath_test

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// TestPlugin has the real plugin attach two pods while no agent runs, and an agent come afterwards.
func TestPlugin(t *testing.T) {
	testenv.NeedFile(t, "/sys/fs/bpf", "use a kernel with CONFIG_BPF_SYSCALL")
	n := newNode(t, "a", fastpath.Options{})
	n.open(t)
	n.set(t)
	program := filepath.Join(t.TempDir(), "fathom-cni")
	if out, err := exec.Command("go", "build", "-o", program, "github.com/fathom-network/fathom/cmd/fathom-cni").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	conf := fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "fathom", "type": "fathom-cni", "mtu": 1500, "dataDir": %q, "coolDown": "0s",
		"nodeAddresses": ["198.51.100.1", "2001:db8:1::1"], "runtimeConfig": {"bandwidth": {"egressRate": %%d}},
		"pools": [{"name": "default", "ranges": ["10.244.1.0/24", "fd00:10:244:1::/64"]}]}`, t.TempDir())
	call := func(command string, i, egressRate int, netns string) {
		t.Helper()
		cmd := exec.Command("sh", "-c", `mount --bind "$0" /sys/fs/bpf && exec "$1"`, n.dir, program)
		cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, fmt.Sprintf("CNI_CONTAINERID=c%d", i), "CNI_IFNAME=eth0", "CNI_NETNS="+netns,
			"CNI_PATH=/", fmt.Sprintf("CNI_ARGS=K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-%d", i))
		cmd.Stdin = bytes.NewBufferString(fmt.Sprintf(conf, egressRate))
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		testenv.Must(t, n.Start(cmd))
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%s: %v: %s", command, err, out.String())
		}
	}
	var pods [2]pod
	var paths [2]string
	rates := [2]int{1_000_000_000, 0} // what the first one sends is limited, by a plugin that runs next
	for i := range pods {
		pods[i].Namespace, paths[i] = linktest.NamespaceAt(t)
		call("ADD", i, rates[i], paths[i])
	}
	ports, err := podlink.Ports(n.Namespace)
	testenv.Must(t, err)
	for _, port := range ports {
		for i := range pods {
			if linktest.Run(t, pods[i].Namespace, "ip", "-br", "addr", "show", "to", port.Addrs[0].Addr.String()) == "" {
				continue
			}
			pods[i].mac, pods[i].hostMAC, pods[i].addrs = port.Addrs[0].MAC, port.HostMAC, []netip.Addr{port.Addrs[0].Addr, port.Addrs[1].Addr}
		}
	}
	for _, port := range ports {
		limited := strings.HasPrefix(port.Name, "web-0")
		if filters := linktest.Run(t, n.Namespace, "tc", "filter", "show", "dev", port.Name, "ingress"); strings.Contains(filters, pin.FromPod) == limited {
			t.Errorf("%s has filters %q", port.Name, filters)
		}
		if limited { // there is room for what "bandwidth" adds
			linktest.Run(t, n.Namespace, "tc", "qdisc", "add", "dev", port.Name, "ingress")
			linktest.Run(t, n.Namespace, "tc", "qdisc", "del", "dev", port.Name, "ingress")
		}
	}
	serve(t, pods[1])
	false4 := frame(pods[0].mac, pods[0].hostMAC, pods[1].addrs[0], pods[1].addrs[0], 64)
	for _, fast := range []bool{false, true} {
		want := "stack pod"
		if fast {
			n.set(t)
			want = "redirected to_pod"
		}
		for _, to := range pods[1].addrs {
			has(t, to.String(), n.counted(t, func() { testenv.Must(t, echo(pods[0].Namespace, "tcp", to, 8080, 10_000)) }), want)
		}
		has(t, "false source", n.counted(t, func() { send(t, pods[0], false4) }), "dropped source")
		has(t, "false MAC", n.counted(t, func() {
			send(t, pods[0], frame(net.HardwareAddr{2, 9, 9, 9, 9, 9}, pods[0].hostMAC, pods[0].addrs[0], pods[1].addrs[0], 64))
		}), "dropped mac")
	}
	for i := range pods {
		call("DEL", i, rates[i], paths[i])
	}
	if c := n.set(t); c.Pods.Removed != 4 {
		t.Errorf("swept %v", c)
	}
}
