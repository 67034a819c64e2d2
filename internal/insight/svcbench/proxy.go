package svcbench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/internal/agent/proxy"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/wake"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// fathomProxy is the argument of a process that runs Fathom's proxy.
type fathomProxy struct {
	Kubeconfig string
	Mode       netconf.ServiceProxy
	Paths      proxy.Paths
	Addr       netip.Addr
}

// runProxy runs Fathom's proxy. When the kernel has all Services, it prints how many seconds writing them took.
func runProxy(ctx context.Context, argument string) error {
	var o fathomProxy
	if err := json.Unmarshal([]byte(argument), &o); err != nil {
		return err
	}
	client, err := kube.Connect(o.Kubeconfig)
	if err != nil {
		return err
	}
	var p *proxy.Proxy
	changed := wake.New()
	p = proxy.New(proxy.Options{Client: client, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})), Paths: o.Paths,
		Resync: 30 * time.Second, Changed: changed.Set})
	p.Set(answer.ProxyConfig{Mode: o.Mode, Node: service.Node{Name: "node"}, NodePortAddrs: []netip.Addr{o.Addr},
		OwnPods: []netip.Prefix{netip.MustParsePrefix(podRange)}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix(serviceRange)}})
	go func() {
		for range changed {
			if !p.Status().Ready {
				continue
			}
			state := ""
			if o.Mode == netconf.ProxyAuto {
				if dir := o.Paths.BPF; !exists(dir) {
					state = " without connect()"
				}
			}
			fmt.Printf("%f%s\n", applied(p), state)
			return
		}
	}()
	p.Run(ctx)
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// applied returns how long writing everything to the kernel took, by the proxy's own metric.
func applied(p *proxy.Proxy) float64 {
	r := prometheus.NewRegistry()
	r.MustRegister(p)
	families, err := r.Gather()
	if err != nil {
		return 0
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == "fathom_service_apply_seconds" && m.Label[0].GetValue() == "whole" {
				return m.GetHistogram().GetSampleSum()
			}
		}
	}
	return 0
}

// program is a running proxy.
type program struct {
	cmd *exec.Cmd
	// spent returns how many seconds the program reports for writing everything to the kernel.
	spent func(ctx context.Context) (float64, error)
	log   *tail
}

// startProxy starts the node's proxy.
func (n *node) startProxy(ctx context.Context, c *cluster) (*program, error) {
	switch n.proxy {
	case Connect, NFTables:
		mode := netconf.ProxyNFTables
		paths := proxy.Paths{BPF: filepath.Join(n.Dir, "bpf", n.name), NetNS: filepath.Join(n.Dir, "none")}
		if n.proxy == Connect {
			mode = netconf.ProxyAuto
			dir, err := cgroup.Open(filepath.Join(n.Group, n.proxy))
			if err != nil {
				return nil, err
			}
			if dir != nil { // without a BPF file system it reports that there is no connect()
				paths.Cgroup = dir.Name()
				dir.Close()
			}
		}
		p, err := n.start(ctx, n.space, programGroup(n.proxy), partProxy, encode(fathomProxy{Kubeconfig: c.kubeconfig(), Mode: mode, Paths: paths, Addr: n.addr}))
		if err != nil {
			return nil, err
		}
		return &program{cmd: p.cmd, log: &tail{}, spent: func(context.Context) (float64, error) {
			if !p.out.Scan() {
				return 0, fmt.Errorf("fathom's proxy has ended")
			}
			number, problem, _ := strings.Cut(p.out.Text(), " ")
			if problem != "" {
				return 0, fmt.Errorf("%s", problem)
			}
			return strconv.ParseFloat(number, 64)
		}}, nil
	}
	if err := c.addNode(ctx, n.name, n.addr.String()); err != nil {
		return nil, err
	}
	k, err := kit.Open(n.KitDir)
	if err != nil {
		return nil, err
	}
	// Everything else is kube-proxy's default, and kubeadm's; the limits of connection tracking are not measured.
	cmd := exec.CommandContext(ctx, k.Bin("kube-proxy"), "--kubeconfig="+c.kubeconfig(), "--hostname-override="+n.name,
		"--proxy-mode="+strings.TrimPrefix(n.proxy, "kube-proxy-"), "--cluster-cidr="+clusterRange, "--conntrack-max-per-core=0",
		"--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s", "--metrics-bind-address=0.0.0.0:10249")
	log := &tail{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := n.startIn(n.space, programGroup(n.proxy), cmd); err != nil {
		return nil, err
	}
	return &program{cmd: cmd, log: log, spent: func(ctx context.Context) (float64, error) {
		return kubeProxySpent(ctx, "http://"+netip.AddrPortFrom(n.addr, 10249).String()+"/metrics")
	}}, nil
}

var syncSum = regexp.MustCompile(`(?m)^kubeproxy_sync_proxy_rules_duration_seconds_sum(?:\{[^}]*\})? (\S+)$`)

func kubeProxySpent(ctx context.Context, url string) (float64, error) {
	for ; ; time.Sleep(50 * time.Millisecond) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return 0, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, err
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return 0, err
		}
		sum := 0.0
		for _, m := range syncSum.FindAllSubmatch(text, -1) {
			seconds, _ := strconv.ParseFloat(string(m[1]), 64)
			sum += seconds
		}
		if sum > 0 { // a sync is counted when it ends; Services may answer before
			return sum, nil
		}
	}
}

// cpu returns the CPU time of the process and of the children it has waited for.
func (p *program) cpu() (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	ticks := 0
	for _, f := range fields[11:15] { // utime, stime, cutime, cstime: proc_pid_stat(5)
		n, err := strconv.Atoi(f)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100), nil // USER_HZ
}

// memory returns the anonymous memory of the process in bytes.
func (p *program) memory() (float64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(data), "RssAnon:")
	number, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	kilobytes, err := strconv.Atoi(number)
	return float64(kilobytes) * 1024, err
}

// tail keeps the end of a program's output.
type tail struct {
	mu   sync.Mutex
	text []byte
}

// Write implements io.Writer.
func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, b...)
	t.text = t.text[max(0, len(t.text)-500):]
	return len(b), nil
}

// String returns it on one line.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(strings.Split(strings.TrimSpace(string(t.text)), "\n"), "; ")
}
