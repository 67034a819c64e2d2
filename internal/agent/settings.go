package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// settings records the node's sysctls as they were before the first agent changed them. The record outlives agents and
// reboots, and is what an uninstall goes by.
//
// Nothing else knows these values. A damaged file is set aside, and the present values are recorded instead: after a power cut
// these are the values of the boot, but a value that an agent has set since cannot be told from the administrator's, and stays
// after an uninstall.
type settings struct {
	node *link.Namespace
	path string
	// damaged is called once for a file that was set aside.
	damaged func(error)
	mu      sync.Mutex // the agent's loop and the proxy's both call
	// last is the last record, in case the file is removed.
	last []podnet.Sysctl
}

func newSettings(node *link.Namespace, dir string, damaged func(error)) *settings {
	return &settings{node: node, path: filepath.Join(dir, "settings.json"), damaged: damaged}
}

// Reasons of recorded values, for readers of the file.
const (
	whyBefore  = "as it was before Fathom's network came"
	whyRebuilt = "as it was when the record of the time before Fathom's network was found damaged"
)

// read returns the record. A damaged one is set aside, and counts as missing.
func (s *settings) read() (known []podnet.Sysctl, err error) {
	data, err := os.ReadFile(s.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	known, err = parseSettings(data)
	if err == nil {
		return known, nil
	}
	aside, moveErr := durable.SetAside(s.path)
	if moveErr != nil {
		return nil, moveErr
	}
	s.damaged(fmt.Errorf("%s was damaged (%w) and is %s now: how the node's settings were before Fathom's network came is not known; "+
		"those that are not as they were have to be put back by hand after an uninstall", s.path, err, aside))
	return nil, nil
}

// parseSettings parses a record. Its names become paths below /proc/sys/net, so none may lead out of it.
func parseSettings(data []byte) ([]podnet.Sysctl, error) {
	var known []podnet.Sysctl
	if err := json.Unmarshal(data, &known); err != nil {
		return nil, err
	}
	for _, c := range known {
		if !filepath.IsLocal(c.Name) || c.Name == "." || c.Name != filepath.Clean(c.Name) || strings.ContainsRune(c.Name, 0) || c.Value == "" {
			return nil, fmt.Errorf("%q with the value %q is no setting", c.Name, c.Value)
		}
	}
	return known, nil
}

func (s *settings) write(known []podnet.Sysctl) error {
	data, err := json.MarshalIndent(known, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(s.path, data, 0o644)
}

// remember records the present values of the settings in want, but for those already recorded.
func (s *settings) remember(want []podnet.Sysctl) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, err := s.read()
	if err != nil {
		return err
	}
	why := whyBefore
	if _, err := os.Lstat(s.path + durable.Damaged); err == nil {
		why = whyRebuilt
	}
	if known == nil {
		known = slices.Clone(s.last)
	}
	before := len(known)
	if _, err := os.Lstat(s.path); errors.Is(err, os.ErrNotExist) {
		before = -1
	}
	for _, c := range unknown(want, known) {
		value, err := s.node.SysctlValue(c.Name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the device does not exist yet; its settings go with it
		}
		if err != nil {
			return err
		}
		known = append(known, podnet.Sysctl{Name: c.Name, Value: value, Why: why})
	}
	s.last = known
	if len(known) == before || len(known) == 0 {
		return nil
	}
	return s.write(known)
}

// restore restores a setting if it was changed, and removes it from the record: from then on it is the administrator's.
func (s *settings) restore(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, err := s.read()
	if err != nil {
		return err
	}
	if known == nil {
		known = slices.Clone(s.last)
	}
	i := slices.IndexFunc(known, func(c podnet.Sysctl) bool { return c.Name == name })
	if i < 0 {
		return nil
	}
	if err := s.node.Sysctl(name, known[i].Value); err != nil {
		return err
	}
	known = slices.Delete(known, i, i+1)
	s.last = slices.Clone(known)
	return s.write(known)
}

// unknown returns the settings in want that are not recorded yet, but for those of Fathom's own tunnel, which go with it.
func unknown(want, known []podnet.Sysctl) []podnet.Sysctl {
	return slices.DeleteFunc(slices.Clone(want), func(c podnet.Sysctl) bool {
		return strings.Contains(c.Name, "/conf/"+podnet.DefaultDevice+"/") ||
			slices.ContainsFunc(known, func(k podnet.Sysctl) bool { return k.Name == c.Name })
	})
}

// loopback is proxy.Loopback of the node.
type loopback struct{ settings *settings }

// routeLocalnet applies to all devices: answers arrive by pods' devices and by those to other nodes.
const routeLocalnet = "ipv4/conf/all/route_localnet"

func (l loopback) Routed() (bool, error) {
	value, err := l.settings.node.SysctlValue(routeLocalnet)
	return value == "1", err
}

func (l loopback) Route(on bool) error {
	if !on {
		return l.settings.restore(routeLocalnet)
	}
	if routed, err := l.Routed(); err != nil || routed {
		return err
	}
	if err := l.settings.remember([]podnet.Sysctl{{Name: routeLocalnet}}); err != nil {
		return err
	}
	return l.settings.node.Sysctl(routeLocalnet, "1")
}
