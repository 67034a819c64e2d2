package dataplane

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/fathom-network/fathom/internal/link"
	"github.com/fathom-network/fathom/internal/podnet"
)

// settings remembers the node's settings as they were before the first agent changed them, across agents, for who puts
// them back.
type settings struct {
	node *link.Namespace
	path string
	mu   sync.Mutex // the agent's loop and the proxy's are two
}

func newSettings(node *link.Namespace, dir string) *settings {
	return &settings{node: node, path: filepath.Join(dir, "settings.json")}
}

func (s *settings) read() ([]podnet.Sysctl, error) {
	data, err := os.ReadFile(s.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var known []podnet.Sysctl
	if err := json.Unmarshal(data, &known); err != nil {
		return nil, fmt.Errorf("read %s: %w", s.path, err)
	}
	return known, nil
}

func (s *settings) write(known []podnet.Sysctl) error {
	data, err := json.MarshalIndent(known, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(s.path, bytes.NewReader(data), 0o644)
}

// remember writes down how settings are that are to be changed, unless that is known.
func (s *settings) remember(want []podnet.Sysctl) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, err := s.read()
	if err != nil {
		return err
	}
	before := len(known)
	for _, c := range unknown(want, known) {
		value, err := s.node.SysctlValue(c.Name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // those of a device that is not there yet go with it
		}
		if err != nil {
			return err
		}
		known = append(known, podnet.Sysctl{Name: c.Name, Value: value, Why: "as it was before Fathom's network came"})
	}
	if len(known) == before {
		return nil
	}
	return s.write(known)
}

// restore puts a setting back, if it was changed, and forgets it: from then on it is the administrator's.
func (s *settings) restore(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	known, err := s.read()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(known, func(c podnet.Sysctl) bool { return c.Name == name })
	if i < 0 {
		return nil
	}
	if err := s.node.Sysctl(name, known[i].Value); err != nil {
		return err
	}
	return s.write(slices.Delete(known, i, i+1))
}

// unknown returns the settings that are not known yet, but for those of our own tunnel, which go with it.
func unknown(want, known []podnet.Sysctl) []podnet.Sysctl {
	return slices.DeleteFunc(slices.Clone(want), func(c podnet.Sysctl) bool {
		return strings.Contains(c.Name, "/conf/"+podnet.DefaultDevice+"/") ||
			slices.ContainsFunc(known, func(k podnet.Sysctl) bool { return k.Name == c.Name })
	})
}

// loopback is proxy.Loopback of the node.
type loopback struct{ settings *settings }

// routeLocalnet is for all devices: answers come back by pods' devices and by those to other nodes.
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
