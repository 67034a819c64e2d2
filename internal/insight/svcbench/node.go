package svcbench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// bare is the node without any proxy.
const bare = "bare"

// node is a proxy's node: a routing namespace, a pod's namespace that connects, and one that answers for all endpoints.
type node struct {
	run
	proxy  string // one of Proxies, or bare
	name   string
	addr   netip.Addr
	space  *link.Namespace
	client *client
	all    []*link.Namespace
	began  []*exec.Cmd
}

// addNode makes the i-th node.
func addNode(ctx context.Context, r run, i int, proxy string) (*node, error) {
	n := &node{run: r, proxy: proxy, name: fmt.Sprintf("node-%d", i), addr: netip.AddrFrom4([4]byte{198, 18, byte(i), 2})}
	here, err := link.Here()
	if err != nil {
		return nil, err
	}
	defer here.Close()
	for _, kind := range []string{"", "-client", "-server"} {
		path := filepath.Join(r.Dir, n.name+kind)
		if err := link.Create(path); err != nil {
			return nil, err
		}
		space, err := link.Open(path)
		if err != nil {
			return nil, err
		}
		if err := space.SetUp("lo", true); err != nil {
			return nil, err
		}
		n.all = append(n.all, space)
	}
	n.space = n.all[0]
	pair := func(a *link.Namespace, nameA, addrA string, b *link.Namespace, nameB, addrB string) error {
		const alias = "fathom bench"
		if err := a.SetPair(link.Device{Name: nameA, Alias: alias}, b, link.Device{Name: nameB, Alias: alias}); err != nil {
			return err
		}
		if err := a.SetAddrs(nameA, []netip.Prefix{netip.MustParsePrefix(addrA)}); err != nil {
			return err
		}
		return b.SetAddrs(nameB, []netip.Prefix{netip.MustParsePrefix(addrB)})
	}
	if err := pair(here, n.name, fmt.Sprintf("198.18.%d.1/24", i), n.space, "eth0", n.addr.String()+"/24"); err != nil {
		return nil, err
	}
	if err := pair(n.space, "client", "10.255.0.1/24", n.all[1], "eth0", "10.255.0.2/24"); err != nil {
		return nil, err
	}
	if err := pair(n.space, "server", "10.254.0.1/24", n.all[2], "eth0", "10.254.0.2/24"); err != nil {
		return nil, err
	}
	for at, command := range map[*link.Namespace]string{
		n.space:  "route add " + endpointRange + " via 10.254.0.2\nroute add " + apiAddr + " via " + fmt.Sprintf("198.18.%d.1", i),
		n.all[1]: "route add default via 10.255.0.1",
		n.all[2]: "route add default via 10.254.0.1\nroute add local " + endpointRange + " dev lo",
	} {
		if err := runIn(at, command, "ip", "-batch", "-"); err != nil {
			return nil, err
		}
	}
	if err := n.space.Sysctl("ipv4/ip_forward", "1"); err != nil {
		return nil, err
	}
	// Connections end faster than their ports become free.
	for name, value := range map[string]string{"ipv4/ip_local_port_range": "1024 65535", "ipv4/tcp_tw_reuse": "1"} {
		if err := n.all[1].Sysctl(name, value); err != nil {
			return nil, err
		}
	}
	// Connections end faster than connection tracking drops their entries, and the limit counts those of all namespaces
	// together. A kernel that has not loaded connection tracking lacks the setting.
	_ = n.space.Sysctl("netfilter/nf_conntrack_tcp_timeout_time_wait", "1")
	if _, err := n.start(ctx, n.all[2], "", partServer, ""); err != nil {
		return nil, err
	}
	n.client, err = n.start(ctx, n.all[1], n.proxy, partClient, "")
	return n, err
}

func runIn(n *link.Namespace, input, program string, args ...string) error {
	var out bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &out
	if err := n.Start(cmd); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, bytes.TrimSpace(out.Bytes()))
	}
	return nil
}

// client is a process of the measurement that executes commands, one per line.
type client struct {
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Scanner
}

// start starts a process in a namespace and in the node's cgroup of that name, and returns when it is ready.
func (n *node) start(ctx context.Context, at *link.Namespace, group, part, argument string) (*client, error) {
	cmd := exec.CommandContext(ctx, n.Part[0], append(n.Part[1:], part, argument)...)
	cmd.Stderr = os.Stderr
	if part != partProxy {
		cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1") // its signals would disturb the measurement
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := n.startIn(at, group, cmd); err != nil {
		return nil, err
	}
	c := &client{cmd: cmd, in: in, out: bufio.NewScanner(out)}
	if part == partProxy {
		return c, nil // its first line says that it is ready
	}
	if !c.out.Scan() {
		return nil, fmt.Errorf("the part %s of the measurement has ended", part)
	}
	return c, nil
}

// startIn starts a program in a namespace, and in a cgroup of the run if one is named.
func (n *node) startIn(at *link.Namespace, group string, cmd *exec.Cmd) error {
	path := filepath.Join(n.Group, group)
	if group != "" {
		dir, err := cgroup.Open(path)
		if err != nil {
			return err
		}
		if dir != nil {
			defer dir.Close()
			cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
		}
	}
	if err := at.Start(cmd); err != nil {
		return err
	}
	n.began = append(n.began, cmd)
	if group == "" {
		return nil
	}
	return cgroup.Add(path, cmd.Process.Pid)
}

// programGroup is the cgroup of the proxy's program, which shows the kernel memory held for it. Clients are in another
// cgroup: the program is not a client of its own.
func programGroup(proxy string) string { return proxy + "-program" }

// do sends a command and returns the answer.
func (c *client) do(order string) (string, error) {
	if _, err := fmt.Fprintln(c.in, order); err != nil {
		return "", err
	}
	if !c.out.Scan() {
		return "", fmt.Errorf("the part that connects has ended: %w", io.ErrUnexpectedEOF)
	}
	if text, failed := strings.CutPrefix(c.out.Text(), "error "); failed {
		return "", fmt.Errorf("%.60s: %s", order, text)
	}
	return c.out.Text(), nil
}

func (c *client) number(order string) (float64, error) {
	text, err := c.do(order)
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(text, 64)
}

// when is number for a command whose answer is a time.
func (c *client) when(order string) (time.Time, error) {
	text, err := c.do(order)
	if err != nil {
		return time.Time{}, err
	}
	nanoseconds, err := strconv.ParseInt(text, 10, 64)
	return time.Unix(0, nanoseconds), err
}

// remove ends everything that runs on the node. Its namespaces end with the last process in them.
func (n *node) remove() {
	for _, cmd := range n.began {
		end(cmd)
	}
	for _, space := range n.all {
		space.Close()
	}
	for _, kind := range []string{"", "-client", "-server"} {
		_ = link.Delete(filepath.Join(n.Dir, n.name+kind)) // if it fails, the file goes with the mount namespace
	}
}

func end(cmd *exec.Cmd) {
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // returns that it was killed
}

// encode encodes a process's argument.
func encode(v any) string {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // impossible: only this package's values
	}
	return string(data)
}
