package svcbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// runInside is the process in new namespaces, which starts everything else.
func runInside(ctx context.Context, argument string) error {
	var r run
	if err := json.Unmarshal([]byte(argument), &r); err != nil {
		return err
	}
	if err := r.prepare(); err != nil {
		return err
	}
	var name unix.Utsname
	_ = unix.Uname(&name)
	report := Report{Date: time.Now().UTC().Format(time.DateOnly), Kernel: unix.ByteSliceToString(name.Release[:]), CPUs: runtime.NumCPU(), StandIn: r.KitDir == ""}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		report.Load, _ = strconv.ParseFloat(strings.Fields(string(load))[0], 64)
	}
	for _, size := range r.Sizes {
		load, results, err := r.measure(ctx, size)
		if err != nil {
			return fmt.Errorf("%d Services with %d endpoints: %w", size.Services, size.Endpoints, err)
		}
		report.Loads, report.Results = append(report.Loads, load), append(report.Results, results...)
	}
	return json.NewEncoder(os.Stdout).Encode(report)
}

// prepare makes mounts, which end with the mount namespace, and adds the address of the API server.
func (r run) prepare() error {
	bpffs := filepath.Join(r.Dir, "bpf")
	if err := os.MkdirAll(bpffs, 0o700); err != nil {
		return err
	}
	for _, m := range []struct {
		what, at, kind string
		flags          uintptr
	}{{"none", "/", "", unix.MS_REC | unix.MS_PRIVATE}, {"proc", "/proc", "proc", 0}, {"bpf", bpffs, "bpf", 0}} {
		if err := unix.Mount(m.what, m.at, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.what, m.at, err)
		}
	}
	here, err := link.Here()
	if err != nil {
		return err
	}
	defer here.Close()
	if err := here.SetUp("lo", true); err != nil {
		return err
	}
	return here.SetAddrs("lo", []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8"), netip.MustParsePrefix(apiAddr + "/32")})
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// measure measures all proxies with one size.
func (r run) measure(ctx context.Context, size Size) (load Load, results []Result, err error) {
	say("%d Services with %d endpoints:", size.Services, size.Endpoints)
	c, err := startCluster(ctx, r, size)
	if err != nil {
		return load, nil, err
	}
	defer c.stop()
	began := time.Now()
	if err := c.load(ctx); err != nil {
		return load, nil, fmt.Errorf("create them in the API server: %w", err)
	}
	load = Load{size, time.Since(began).Seconds()}
	say("  the API server has them after %.1f s", load.Seconds)
	empty, err := addNode(ctx, r, 0, bare)
	if err != nil {
		return load, nil, err
	}
	defer empty.remove()
	var nodes []*node
	for i, name := range r.Proxies {
		result := Result{Size: size, Proxy: name}
		if isPeer(name) && r.KitDir == "" {
			result.Note = "not measured: there is no kit with a kube-proxy (`make kit`)"
			results = append(results, result)
			continue
		}
		if isPeer(name) && size.Services > r.PeersUpTo {
			result.Note = fmt.Sprintf("not measured with more than %d Services", r.PeersUpTo)
			results = append(results, result)
			continue
		}
		n, err := addNode(ctx, r, i+1, name)
		if err != nil {
			return load, nil, err
		}
		defer n.remove()
		if err := n.measure(ctx, c, &result); err != nil {
			return load, nil, fmt.Errorf("%s: %w", name, err)
		}
		say("  %-20s %s", name, result.brief())
		results = append(results, result)
		if result.Start > 0 {
			nodes = append(nodes, n)
		}
	}
	// The kernel balances without its proxy, so that the proxy does not disturb the measurement.
	if err := r.race(c, empty, nodes, results); err != nil {
		return load, nil, err
	}
	return load, results, ctx.Err()
}

func isPeer(proxy string) bool { return strings.HasPrefix(proxy, "kube-proxy") }

func (r Result) brief() string {
	if r.Start == 0 {
		return r.Note
	}
	return fmt.Sprintf("answers after %.2f s, changes %.1f ms (p50) %.1f ms (p99), %.0f%% of a processor", r.Start, r.P50, r.P99, r.CPU)
}

// measure measures everything that needs the proxy's program, and ends the program.
func (n *node) measure(ctx context.Context, c *cluster, result *Result) error {
	began := time.Now()
	p, err := n.startProxy(ctx, c)
	if err != nil {
		return err
	}
	defer end(p.cmd)
	done, err := n.client.when(fmt.Sprintf("await %v %s", n.Patience, join(c.services())))
	if err != nil {
		result.Note = fmt.Sprintf("Services do not answer after %v", n.Patience)
		say("  %s: %v: %s", n.proxy, err, p.log)
		return nil
	}
	result.Start = done.Sub(began).Seconds()
	if result.Program, err = p.spent(ctx); err != nil {
		return err
	}
	times, err := n.changes(ctx, c)
	if err != nil {
		return err
	}
	if result.Changes = len(times); len(times) > 0 {
		slices.Sort(times)
		at := func(share float64) float64 {
			return times[int(math.Ceil(share*float64(len(times))))-1].Seconds() * 1000
		}
		result.P50, result.P99 = at(0.5), at(0.99)
	}
	if err := n.load(ctx, c, p, result); err != nil {
		return err
	}
	memory, err := p.memory()
	if err != nil {
		return err
	}
	result.Memory = memory / 1e6
	kernel, _, err := cgroup.KernelMemory(filepath.Join(n.Group, programGroup(n.proxy)))
	result.Kernel = float64(kernel) / 1e6
	return err
}

// changesLimit is how long changes are measured: kube-proxy takes a second for each by default.
const changesLimit = 15 * time.Second

// changes changes the endpoints of a Service repeatedly, and returns the times until a connection reaches the new ones.
func (n *node) changes(ctx context.Context, c *cluster) (times []time.Duration, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	i := c.Services / 2
	if err := c.change(ctx, i, oldEndpoints); err != nil { // the load of another proxy may have left others
		return nil, err
	}
	seen, err := c.watch(ctx, i)
	if err != nil {
		return nil, err
	}
	type answer struct {
		at  time.Time
		err error
	}
	bases, ranges := []string{oldEndpoints, newEndpoints}, []string{oldRange, newRange}
	for began := time.Now(); len(times) < n.Changes && time.Since(began) < changesLimit || len(times)%2 == 1; {
		to := (len(times) + 1) % 2
		met := make(chan answer, 1)
		go func() {
			at, err := n.client.when(fmt.Sprintf("until %v %s %s", n.Patience, ranges[to], serviceAt(i)))
			met <- answer{at, err}
		}()
		if err := c.change(ctx, i, bases[to]); err != nil {
			return nil, err
		}
		var told time.Time
		select {
		case told = <-seen:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		a := <-met
		if a.err != nil {
			return nil, fmt.Errorf("a change has no effect: %w", a.err)
		}
		times = append(times, max(0, a.at.Sub(told))) // the proxy's watch may be served before this one
	}
	return times, nil
}

// load makes 100 changes per second, of random Services, and records what they cost the proxy.
func (n *node) load(ctx context.Context, c *cluster, p *program, result *Result) error {
	const rate = 100
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(32)
	before, err := p.cpu()
	if err != nil {
		return err
	}
	began, count := time.Now(), 0
	changed := map[int]bool{}
	tick := time.NewTicker(time.Second / rate)
	defer tick.Stop()
	for time.Since(began) < n.Load && gctx.Err() == nil {
		<-tick.C
		i := rand.IntN(c.Services)
		base := oldEndpoints
		if changed[i] = !changed[i]; changed[i] {
			base = newEndpoints
		}
		g.Go(func() error { return c.change(gctx, i, base) })
		count++
	}
	if err := g.Wait(); err != nil {
		return err
	}
	spent := time.Since(began)
	after, err := p.cpu()
	if err != nil {
		return err
	}
	result.CPU, result.ChangeRate = 100*float64(after-before)/float64(spent), float64(count)/spent.Seconds()
	return nil
}

const sample = 50

// sampled returns the Services to connect to: the first, the last, and others.
func (c *cluster) sampled() []int {
	list := []int{0, c.Services - 1}
	for i := range min(sample, c.Services) {
		list = append(list, i*c.Services/min(sample, c.Services))
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func serviceAt(i int) netip.AddrPort { return netip.AddrPortFrom(nth(serviceBase, i+1), servicePort) }

func (c *cluster) services() (all []netip.AddrPort) {
	for _, i := range c.sampled() {
		all = append(all, serviceAt(i))
	}
	return all
}

// direct returns the endpoints themselves, ordered so that the Services take turns as in services: all of them, since a
// Service distributes connections over all, or one of each Service.
func (c *cluster) direct(each int) (all []netip.AddrPort) {
	for e := range each {
		for n, i := range c.sampled() {
			all = append(all, netip.AddrPortFrom(nth(oldEndpoints, 1+i*c.Endpoints+(n+e)%c.Endpoints), serverPort))
		}
	}
	return all
}

func join(list []netip.AddrPort) string {
	var words []string
	for _, a := range list {
		words = append(words, a.String())
	}
	return strings.Join(words, " ")
}

// race makes all nodes connect in turns, in rounds so short that other load on the machine affects all of them.
func (r run) race(c *cluster, empty *node, nodes []*node, results []Result) error {
	const turn = 60 * time.Millisecond
	services := join(c.services())
	direct := map[string]string{"crr": join(c.direct(c.Endpoints)), "rr": join(c.direct(1))}
	ratios := map[*node]*[3][]float64{}
	for _, n := range nodes {
		ratios[n] = &[3][]float64{}
	}
	for round := range r.Rounds {
		for _, what := range []string{"crr", "rr"} {
			// Each round starts with another node.
			order := slices.Concat(nodes[round%max(1, len(nodes)):], nodes[:round%max(1, len(nodes))])
			ground, err := empty.client.number(fmt.Sprintf("%s %v %s", what, turn, direct[what]))
			if err != nil {
				return err
			}
			for _, n := range order {
				var got [2]float64
				for _, i := range []int{round % 2, 1 - round%2} {
					if got[i], err = n.client.number(fmt.Sprintf("%s %v %s", what, turn, []string{direct[what], services}[i])); err != nil {
						return fmt.Errorf("%s: %w", n.proxy, err)
					}
				}
				if got[0] == 0 || ground == 0 {
					return errors.New("the machine is too busy: there was no connection in a turn")
				}
				all := ratios[n]
				if what == "crr" {
					all[0], all[2] = append(all[0], got[1]/got[0]), append(all[2], got[0]/ground)
				} else {
					all[1] = append(all[1], got[1]/got[0])
				}
			}
		}
	}
	for _, n := range nodes {
		i := slices.IndexFunc(results, func(r Result) bool { return r.Proxy == n.proxy })
		x := &results[i]
		x.CRR, x.RR, x.Bare = ratio(ratios[n][0]), ratio(ratios[n][1]), ratio(ratios[n][2])
		say("  %-20s CRR %.2f (%.2f to %.2f), RR %.2f (%.2f to %.2f) of direct", n.proxy, x.CRR.Median, x.CRR.Low, x.CRR.High, x.RR.Median, x.RR.Low, x.RR.High)
	}
	return nil
}

func ratio(all []float64) Ratio {
	if len(all) == 0 {
		return Ratio{}
	}
	slices.Sort(all)
	last := float64(len(all) - 1)
	at := func(share float64) float64 { return all[int(math.Round(share*last))] }
	return Ratio{Median: at(0.5), Low: at(0.25), High: at(0.75)}
}
