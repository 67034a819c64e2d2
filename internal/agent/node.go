package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/cni"
	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/kernel/podroute"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// networkName is the name of the network in the conflist.
const networkName = "fathom"

// writeConflist announces the network to the runtime. Runtimes watch the directory, so an unchanged file is not written again.
func (a *Agent) writeConflist(plan podnet.Plan, own podnet.Node) error {
	data, err := conflist.Marshal(networkName, conflist.Config{
		MTU:           plan.PodMTU,
		NodeAddresses: a.podSources,
		Pools:         []ipam.Pool{{Name: netconf.DefaultPool, Ranges: own.PodCIDRs}},
		DataDir:       NodePaths().Leases,
		CoolDown:      a.config.CoolDown,
		AgentSocket:   NodePaths().Socket,
		// Only the agent knows whether a pod asks for a pool. Without pools, the plugin attaches pods without it.
		AgentRequired: a.view.Pools.Len() > 0,
		Isolates:      a.policies.On(),
	})
	if err != nil {
		return fmt.Errorf("make the conflist: %w", err)
	}
	data = append(data, '\n')
	path := a.Paths.Conflist
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, data) {
		return nil
	}
	if err := durable.WriteFile(path, data, 0o644); err != nil {
		return fmt.Errorf("write the conflist: %w", err)
	}
	a.Log.Info("wrote the conflist", "path", path)
	return nil
}

// readConflist reads the plugin's present configuration. It is the zero value on a node that carries no pods yet.
func (a *Agent) readConflist() conflist.Config {
	data, err := os.ReadFile(a.Paths.Conflist)
	if err != nil {
		return conflist.Config{}
	}
	var list struct {
		Plugins []json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal(data, &list); err != nil || len(list.Plugins) == 0 {
		return conflist.Config{}
	}
	c, err := conflist.Parse(list.Plugins[0])
	if err != nil {
		return conflist.Config{}
	}
	return c
}

// needed reports whether the plugin needs the agent to attach a pod.
func (a *Agent) needed() bool { return a.readConflist().AgentRequired }

// installProgram puts the plugin where the runtime looks for plugins. A running one keeps the old file.
func installProgram(program, dir string) error {
	if err := keepCopy(program, filepath.Join(dir, conflist.Plugin)); err != nil {
		return fmt.Errorf("install the CNI plugin: %w", err)
	}
	return nil
}

// keepCopy makes the file at path a copy of the program, unless it is one.
func keepCopy(program, path string) error {
	source, err := os.Open(program)
	if err != nil {
		return err
	}
	defer source.Close()
	if same, err := isCopy(source, path); err != nil || same {
		return err
	}
	if _, err := source.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return durable.Write(path, source, 0o755)
}

// isCopy reports whether the file at path has the content of source. It reads both in pieces: the plugin has megabytes, and most
// starting agents find it in place.
func isCopy(source *os.File, path string) (bool, error) {
	have, err := os.Open(path)
	if err != nil {
		return false, nil // it is made
	}
	defer have.Close()
	is, err := source.Stat()
	if err != nil {
		return false, err
	}
	if has, err := have.Stat(); err != nil || has.Size() != is.Size() {
		return false, nil
	}
	var a, b [64 << 10]byte
	for {
		n, err := io.ReadFull(source, a[:])
		if m, _ := io.ReadFull(have, b[:]); m != n || !bytes.Equal(a[:n], b[:m]) {
			return false, nil
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
	}
}

// attachPatience is longer than any ADD takes: a younger lease may belong to an ADD in progress.
const attachPatience = time.Minute

// openLeases reopens the store of leases, which makes again what was removed of it. If the directory that is mounted into this
// container was removed, only a new container helps.
func (a *Agent) openLeases() error {
	store, err := lease.Open(a.Paths.Leases, conflist.DefaultCoolDown)
	var removed *lease.RemovedError
	if errors.As(err, &removed) {
		a.event(true, "LeasesRemoved", err.Error())
		return err
	}
	if err == nil { // otherwise the users of the open one report what is wrong
		a.leases = store
	}
	return nil
}

// network returns what lost leases are rebuilt from.
func (a *Agent) network() cni.Network {
	return cni.Network{Name: networkName, Namespaces: a.Paths.NetNS, Pools: func() []ipam.Pool {
		pools := a.readConflist().Pools
		if state, err := a.leases.Look(); err == nil {
			pools = append(pools, state.Pools...)
		}
		if a.view == nil {
			return pools
		}
		blocks, _ := a.blocks.All() // of pools that may have gone with the leases
		for _, b := range blocks {
			if b.Node == a.Node {
				pools = append(pools, ipam.Pool{Name: b.Pool, Ranges: []netip.Prefix{b.Prefix}})
			}
		}
		return pools
	}}
}

// sweep takes back what deleted pods have left and the plugin was never asked to remove: the runtime was killed, or the node lost
// power. It returns the remaining leases.
func (a *Agent) sweep(ctx context.Context) ([]lease.Lease, error) {
	swept, err := cni.Sweep(a.node, a.leases, a.network(), func(l lease.Lease, present bool) bool {
		// A veth pair ends with the namespace of either end. A device that exists therefore proves that its pod's
		// namespace exists, whatever this process sees of the runtime's mounts.
		if present || a.hasNetNS(l.Netns) {
			return true
		}
		if !a.leases.OfThisBoot(l) {
			return false // the runtime continues no ADD from before the boot
		}
		wait := attachPatience - a.leases.Age(l)
		if wait > 0 {
			a.lookIn(wait)
		}
		return wait > 0
	})
	a.tellDamagedLeases(swept.Damaged)
	a.metrics.swept.WithLabelValues("lease").Add(float64(len(swept.Leases)))
	a.metrics.leases.Set(float64(len(swept.Kept)))
	for _, l := range swept.Leases {
		a.Log.Info("took back the addresses of a pod that is gone", "pod", l.PodNamespace+"/"+l.PodName, "addresses", l.Addresses)
	}
	news := swept.Rebuilt
	for _, l := range swept.Kept {
		if l.Rebuilt && a.leases.OfThisBoot(l) && a.leases.Age(l) < rebuiltNews {
			news = append(news, l)
		}
	}
	a.tellRebuiltLeases(news)
	if err != nil {
		err = fmt.Errorf("take back what pods that are gone have left: %w", err)
	}
	return swept.Kept, err
}

// endFlows has the flows of addresses that were released since the last look ended.
func (a *Agent) endFlows(p podPorts) error {
	released, err := a.leases.Released()
	if err != nil {
		return err
	}
	inUse, err := a.leases.Held()
	if err != nil {
		return err
	}
	a.flows.set(released, inUse, p)
	return nil
}

// hasNetNS reports whether a network namespace is mounted at the path that the runtime gave.
func (a *Agent) hasNetNS(path string) bool {
	var s unix.Statfs_t
	err := unix.Statfs(filepath.Join(a.Paths.NetNS, filepath.Base(path)), &s)
	return err == nil && s.Type == unix.NSFS_MAGIC
}

// observe reads what the kernel, the leases and the pools hold now.
func (a *Agent) observe() (answer.Node, error) {
	s := answer.Node{Status: a.state.get()}
	var err error
	if s.Kernel, err = podroute.Read(a.node, s.Plan.Sysctls); err != nil {
		return s, err
	}
	rules, err := ruleset.Open(link.OwnNetNS) // a.rules belongs to the loop
	if err != nil {
		return s, err
	}
	defer rules.Close()
	if s.Kernel.Masquerade, err = rules.Masquerade(); err != nil {
		return s, err
	}
	if s.Kernel.Guard, err = rules.Guard(s.Plan.Guard); err != nil {
		return s, err
	}
	if s.Pods, s.Strays, err = podlink.Ends(a.node); err != nil {
		return s, err
	}
	if s.FastPath, err = a.fast.state(); err != nil {
		return s, err
	}
	store, err := lease.Open(a.Paths.Leases, s.Config.CoolDown)
	if err != nil {
		return s, err
	}
	state, err := store.State()
	if err != nil {
		return s, err
	}
	s.Pools = append(a.readConflist().Pools, state.Pools...)
	if s.Usage, err = store.Usage(s.Pools); err != nil {
		return s, err
	}
	leases, err := store.List()
	for _, l := range leases {
		s.Leases = append(s.Leases, answer.Lease{ContainerID: l.ContainerID, IfName: l.IfName, Namespace: l.PodNamespace,
			Pod: l.PodName, UID: l.PodUID, Device: l.HostDevice, Pool: l.Pool, Addresses: l.Addresses, Time: l.Time})
	}
	return s, err
}
