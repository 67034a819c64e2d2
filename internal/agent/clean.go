package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/fathom-network/fathom/internal/agent/proxy"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/kernel/podroute"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/wake"
)

// Clean takes away what Run and the plugin made on the node: configuration and program first, so that no pod comes
// any more, then what is in the kernel, then the files. When that is done it reports to be ready, and waits for
// the end of the context: whoever runs it learns by that that the node is clean.
func Clean(ctx context.Context, o Options) error {
	a := &Agent{Options: o, wake: wake.New(), metrics: newMetrics(o.Node)}
	a.state.set(answer.Status{Reason: "the node is being cleaned"})
	stop, err := a.serve(ctx)
	if err != nil {
		return err
	}
	defer stop()
	if err := a.clean(); err != nil {
		return fmt.Errorf("clean the node: %w", err)
	}
	a.Log.Info("the node is clean")
	a.state.set(answer.Status{Ready: true})
	<-ctx.Done()
	return nil
}

func (a *Agent) clean() error {
	for _, path := range []string{a.Paths.Conflist, filepath.Join(a.Paths.CNIBin, conflist.Plugin)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	node, err := link.Here()
	if err != nil {
		return err
	}
	defer node.Close()
	node.SysctlsAt(a.Paths.Sysctl)
	settings := newSettings(node, a.Paths.Leases, func(err error) { a.Log.Error("a file was damaged", "error", err) })
	if err := proxy.Remove(proxyPaths(a.Paths), loopback{settings}); err != nil {
		return err
	}
	if _, err := node.SetNodeCacheAddrs(nil); err != nil {
		return err
	}
	if err := fastpath.Remove(node, a.Paths.BPF); err != nil {
		return err
	}
	devices, err := podlink.Devices(node)
	if err != nil {
		return err
	}
	for _, d := range devices {
		a.Log.Info("a pod is cut off", "device", d.Name, "alias", d.Alias)
		if err := podlink.Delete(node, d.Name, d.Alias); err != nil {
			return err
		}
	}
	// A plan of nothing, and the settings as they were.
	before, err := settings.read()
	if err != nil {
		return err
	}
	before = slices.DeleteFunc(before, func(c podnet.Sysctl) bool {
		_, err := node.SysctlValue(c.Name)
		return err != nil // those of devices that are gone went with them
	})
	if _, err := podroute.Set(node, podnet.Plan{Node: a.Node, State: podnet.State{Sysctls: before}}); err != nil {
		return err
	}
	rules, err := ruleset.Open(link.OwnNetNS)
	if err != nil {
		return err
	}
	defer rules.Close()
	for _, table := range []string{ruleset.PolicyTable, ruleset.MasqueradeTable, ruleset.GuardTable, service.UnservedTable, service.AggregatesTable} {
		if err := rules.Delete(table); err != nil {
			return err
		}
	}
	if err := os.Remove(a.closedMark()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// The directory itself is a mount.
	entries, err := os.ReadDir(a.Paths.Leases)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(a.Paths.Leases, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
