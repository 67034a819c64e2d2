package topology

import (
	"fmt"
	"math"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

var gateName = regexp.MustCompile(`^[A-Z][A-Za-z0-9]*$`)

// text writes the number as a problem quotes it.
func (v item[T]) text() string {
	if !v.set {
		return ""
	}
	return fmt.Sprint(v.value)
}

// count returns the number, or the default when it was not given or is out of range.
func (b *builder) count(v number, byDefault, low, high int) int {
	switch {
	case !v.set:
		return byDefault
	case v.value < low || v.value > high:
		b.add(v.at, v.text(), "want a number from %d to %d", low, high)
		return byDefault
	}
	return v.value
}

func (b *builder) featureGates(gates map[string]item[bool]) map[string]bool {
	var m map[string]bool
	for _, name := range sortedKeys(gates) {
		v := gates[name]
		if !gateName.MatchString(name) {
			b.add(v.at, "", "%q is not the name of a feature gate; want something like AllAlpha", name)
			continue
		}
		if m == nil {
			m = map[string]bool{}
		}
		m[name] = v.value
	}
	return m
}

const wantLabelValue = "not a label value; want at most 63 letters, digits, '-', '_' and '.', a letter or digit at both ends, or nothing"

func (b *builder) labels(labels map[string]text) map[string]string {
	var m map[string]string
	for _, key := range sortedKeys(labels) {
		v := labels[key]
		if !isLabelKey(key) {
			b.add(v.at, "", "%q is not a label key; want NAME or DOMAIN/NAME, such as example.com/rack", key)
		}
		if !isLabelValue(v.value) {
			b.add(v.at, v.value, "%s", wantLabelValue)
		}
		if m == nil {
			m = map[string]string{}
		}
		m[key] = v.value
	}
	return m
}

func (b *builder) taints(specs []taintSpec) []Taint {
	var taints []Taint
	seen := map[Taint]bool{}
	for _, t := range specs {
		at := func(v text) source {
			if v.set {
				return v.at
			}
			return t.at
		}
		if !isLabelKey(t.key.value) {
			b.add(at(t.key), t.key.value, "not a taint key; want NAME or DOMAIN/NAME, such as example.com/dedicated")
		}
		if !isLabelValue(t.value.value) {
			b.add(at(t.value), t.value.value, "%s", wantLabelValue)
		}
		effects := []string{"NoSchedule", "PreferNoSchedule", "NoExecute"}
		if !slices.Contains(effects, t.effect.value) {
			b.add(at(t.effect), t.effect.value, "not a taint effect; %s", didYouMean(t.effect.value, effects))
		}
		// The API refuses two taints with the same key and effect, whatever their values.
		id := Taint{Key: t.key.value, Effect: t.effect.value}
		if seen[id] {
			b.add(t.at, "", "the node has another taint %s with effect %s; remove one", id.Key, id.Effect)
		}
		seen[id] = true
		taints = append(taints, Taint{Key: t.key.value, Value: t.value.value, Effect: t.effect.value})
	}
	return taints
}

// Paths of a node that a mount may not cover: ownedWhole with all that is in them, ownedTop only
// themselves, so that one program more in /opt/cni/bin is possible.
var (
	ownedWhole = []string{
		"/proc", "/sys", "/dev", "/etc/kubernetes", "/run/containerd", "/run/netns",
		"/var/lib/containerd", "/var/lib/etcd", "/var/lib/kubelet", "/var/lib/cni",
	}
	ownedTop = []string{
		"/etc/cni/net.d", "/opt/cni/bin", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf",
		"/etc/containerd", "/etc/machine-id", "/run", "/tmp", "/var/log", "/var/run",
		"/bin", "/sbin", "/lib", "/lib64", "/usr",
	}
)

// ownedPath returns the path of the lab that a mount on p would cover, or "".
func ownedPath(p string) string { return covered(p, ownedWhole, ownedTop) }

// covered returns which path a mount on p would cover, or lie in if it is one of whole; "" if none.
func covered(p string, whole, top []string) string {
	within := func(inner, outer string) bool {
		return inner == outer || outer == "/" || strings.HasPrefix(inner, outer+"/")
	}
	for _, o := range whole {
		if within(p, o) || within(o, p) {
			return o
		}
	}
	for _, o := range top {
		if within(o, p) {
			return o
		}
	}
	return ""
}

func (b *builder) mounts(specs []mountSpec) []Mount {
	var mounts []Mount
	for _, s := range specs {
		m := Mount{HostPath: s.hostPath.value, NodePath: s.target(), ReadOnly: s.readOnly.value}
		at := s.nodePath.at
		if !s.nodePath.set {
			at = s.hostPath.at
		}
		if s.nodePath.set && !isPlainPath(m.HostPath) {
			b.add(s.hostPath.at, m.HostPath, "want an absolute path without . and ..")
		} else if isPlainPath(m.HostPath) {
			b.hostPath(m.HostPath, s.hostPath)
		}
		if !isPlainPath(m.NodePath) {
			b.add(at, m.NodePath, "want an absolute path without . and ..")
		} else if owned := ownedPath(m.NodePath); owned != "" {
			b.add(at, m.NodePath, "would cover the node's own %s; want a nodePath elsewhere, such as /mnt", owned)
		}
		mounts = append(mounts, m)
	}
	return mounts
}

func isPlainPath(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && !strings.ContainsAny(p, "\x00\n")
}

func (b *builder) wire(s wireSpec) Wire {
	var w Wire
	var err error
	if s.rate.set {
		w.Rate = s.rate.value
		if _, err = ParseRate(w.Rate); err != nil {
			b.add(s.rate.at, w.Rate, "%s", wantRate)
		}
	}
	if s.delay.set {
		w.Delay = s.delay.value
		if _, err = ParseDelay(w.Delay); err != nil {
			b.add(s.delay.at, w.Delay, "%s", wantDelay)
		}
	}
	if s.loss.set {
		if w.Loss, err = ParseLoss(s.loss.value); err != nil {
			b.add(s.loss.at, s.loss.value, "%s", wantLoss)
		}
	}
	return w
}

const (
	wantRate  = "not a rate; want a number with one of bit, kbit, mbit, gbit, bps, kbps, mbps or gbps, such as 10mbit"
	wantDelay = "not a delay; want a duration from 0s to 1m, such as 20ms"
	wantLoss  = "not a loss; want percent of packets from 0 to 100, such as 0.5"
)

var rateSyntax = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?)([kmg]?)(bit|bps)$`)

// ParseRate returns bits a second for a rate as tc(8) writes it: "bit" counts bits, "bps" counts bytes.
// Unlike tc it wants a unit, because a bare number is easily meant as something else.
func ParseRate(s string) (uint64, error) {
	m := rateSyntax.FindStringSubmatch(s)
	if m == nil {
		return 0, fmt.Errorf("rate %q: %s", s, wantRate)
	}
	n, err := strconv.ParseFloat(m[1], 64)
	n *= map[string]float64{"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[m[2]]
	if m[3] == "bps" {
		n *= 8
	}
	if err != nil || n < 1000 || n > 1e12 {
		return 0, fmt.Errorf("rate %q: out of range; want 1kbit to 1000gbit", s)
	}
	return uint64(n), nil
}

// ParseDelay reads a wire's delay.
func ParseDelay(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || d > time.Minute {
		return 0, fmt.Errorf("delay %q: %s", s, wantDelay)
	}
	return d, nil
}

// ParseLoss reads percent of packets lost, with a percent sign or without.
func ParseLoss(s string) (float64, error) {
	f, err := strconv.ParseFloat(strings.TrimSuffix(s, "%"), 64)
	if err != nil || math.IsNaN(f) || f < 0 || f > 100 {
		return 0, fmt.Errorf("loss %q: %s", s, wantLoss)
	}
	return f, nil
}
