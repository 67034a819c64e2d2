package dataplane

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/bpf"
	"github.com/fathom-network/fathom/internal/conflist"
	"github.com/fathom-network/fathom/internal/link"
	"github.com/fathom-network/fathom/internal/nodestate"
	"github.com/fathom-network/fathom/internal/podnet"
	"github.com/fathom-network/fathom/internal/proxy"
	"github.com/fathom-network/fathom/internal/ruleset"
)

// Clean takes away what Run and the plugin made on the node: configuration and program first, so that no pod comes
// any more, then what is in the kernel, then the files. When that is done it reports to be ready, and waits for
// the end of the context: whoever runs it learns by that that the node is clean.
func Clean(ctx context.Context, o Options) error {
	a := &Agent{Options: o, wake: make(chan struct{}, 1), metrics: newMetrics(o.Node)}
	a.state.set(nodestate.Status{Reason: "the node is being cleaned"})
	stop, err := a.serve(ctx)
	if err != nil {
		return err
	}
	defer stop()
	if err := a.clean(); err != nil {
		return fmt.Errorf("clean the node: %w", err)
	}
	a.Log.Info("the node is clean")
	a.state.set(nodestate.Status{Ready: true})
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
	if err := proxy.Remove(proxyPaths(a.Paths)); err != nil {
		return err
	}
	if _, err := node.SetNodeCacheAddrs(nil); err != nil {
		return err
	}
	if err := bpf.Remove(node, a.Paths.BPF); err != nil {
		return err
	}
	devices, err := node.PodDevices()
	if err != nil {
		return err
	}
	for _, d := range devices {
		a.Log.Info("a pod is cut off", "device", d.Name, "alias", d.Alias)
		if err := node.DeletePod(d.Name, d.Alias); err != nil {
			return err
		}
	}
	// A plan of nothing, and the settings as they were.
	settings, err := readSettings(a.Paths.Leases)
	if err != nil {
		return err
	}
	there, err := node.PodNetwork(settings) // those of devices that are gone went with them
	if err != nil {
		return err
	}
	for i := range there.Sysctls {
		j := slices.IndexFunc(settings, func(c podnet.Sysctl) bool { return c.Name == there.Sysctls[i].Name })
		there.Sysctls[i].Value = settings[j].Value
	}
	if _, err := node.SetPodNetwork(podnet.Plan{Node: a.Node, State: podnet.State{Sysctls: there.Sysctls}}); err != nil {
		return err
	}
	rules, err := ruleset.Open("/proc/self/ns/net")
	if err != nil {
		return err
	}
	defer rules.Close()
	if err := rules.Delete(ruleset.MasqueradeTable); err != nil {
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

// settingsFile holds the settings of the node as they were before the first agent changed them.
const settingsFile = "settings.json"

func readSettings(dir string) ([]podnet.Sysctl, error) {
	data, err := os.ReadFile(filepath.Join(dir, settingsFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var settings []podnet.Sysctl
	if err := json.Unmarshal(data, &settings); err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(dir, settingsFile), err)
	}
	return settings, nil
}

// rememberSettings writes down how the node's settings are before they are changed for the first time.
func (a *Agent) rememberSettings(want []podnet.Sysctl) error {
	known, err := readSettings(a.Paths.Leases)
	if err != nil {
		return err
	}
	fresh := unknown(want, known)
	if len(fresh) == 0 {
		return nil
	}
	now, err := a.node.PodNetwork(fresh)
	if err != nil {
		return err
	}
	for _, c := range now.Sysctls { // those of a device that is not there yet go with it
		known = append(known, podnet.Sysctl{Name: c.Name, Value: c.Value, Why: "as it was before Fathom's network came"})
	}
	if len(now.Sysctls) == 0 {
		return nil
	}
	data, err := json.MarshalIndent(known, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(filepath.Join(a.Paths.Leases, settingsFile), bytes.NewReader(data), 0o644)
}

// unknown returns the settings that are not known yet, but for those of our own tunnel, which go with it.
func unknown(want, known []podnet.Sysctl) []podnet.Sysctl {
	return slices.DeleteFunc(slices.Clone(want), func(c podnet.Sysctl) bool {
		return strings.Contains(c.Name, "/conf/"+podnet.DefaultDevice+"/") ||
			slices.ContainsFunc(known, func(k podnet.Sysctl) bool { return k.Name == c.Name })
	})
}
