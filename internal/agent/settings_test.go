package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// The settings of a node are put back as they were, unless somebody else changed them: then they are his.
func TestLoopback(t *testing.T) {
	node, dir := linktest.Namespace(t), t.TempDir()
	l := loopback{newSettings(node, dir, never(t))}
	check := func(on bool, want string) {
		t.Helper()
		testenv.Must(t, loopback{newSettings(node, dir, never(t))}.Route(on)) // of any agent, also of one that was started since
		if got, err := node.SysctlValue(routeLocalnet); err != nil || got != want {
			t.Errorf("routed %v: %s, %v; want %s", on, got, err, want)
		}
		if on, err := l.Routed(); err != nil || on != (want == "1") {
			t.Errorf("%v, %v", on, err)
		}
	}
	check(false, "0")
	for range 2 {
		check(true, "1")
		check(true, "1")
		testenv.Must(t, l.settings.remember([]podnet.Sysctl{{Name: "ipv4/ip_forward"}, {Name: "ipv4/conf/none/rp_filter"}}))
		check(false, "0")
		check(false, "0")
	}
	testenv.Must(t, node.Sysctl(routeLocalnet, "1"))
	check(true, "1")
	check(false, "1")
	known, err := l.settings.read()
	if err != nil || len(known) != 1 || known[0].Name != "ipv4/ip_forward" {
		t.Errorf("remembered: %v, %v; want ipv4/ip_forward", known, err)
	}
}

// What is restored when the network goes is what was there before it came: not the settings of its own tunnel, whose
// files are gone by then.
func TestUnknownSettings(t *testing.T) {
	want := []podnet.Sysctl{{Name: "ipv4/ip_forward", Value: "1"}, {Name: "ipv4/conf/eth0/rp_filter", Value: "2"}, {Name: "ipv4/conf/fathom.vxlan/rp_filter", Value: "2"}}
	got := unknown(want, []podnet.Sysctl{{Name: "ipv4/ip_forward", Value: "0"}})
	if !slices.Equal(got, want[1:2]) {
		t.Errorf("to be remembered: %v, want %v", got, want[1:2])
	}
}

// never is for tests in which no file is damaged.
func never(t *testing.T) func(error) {
	return func(err error) { t.Errorf("told of damage: %v", err) }
}

// A damaged record is set aside, told once, and begun anew; what it said is not made up.
func TestDamagedSettings(t *testing.T) {
	node := linktest.Namespace(t)
	forward := []podnet.Sysctl{{Name: "ipv4/ip_forward"}}
	whole := `[{"Name":"ipv4/ip_forward","Value":"1"}]`
	damages := testenv.Damages([]byte(whole))
	damages["another form"] = []byte(`{"Name": "ipv4/ip_forward"}`)
	damages["a name that leads elsewhere"] = []byte(`[{"Name":"../kernel/core_pattern","Value":"|/bin/x"}]`)
	damages["no name"] = []byte(`[{}]`)
	for name, data := range damages {
		t.Run(name, func(t *testing.T) {
			dir, told := t.TempDir(), 0
			s := newSettings(node, dir, func(err error) { told++ })
			testenv.Must(t, os.WriteFile(s.path, data, 0o644))
			testenv.Must(t, s.remember(forward))
			testenv.Must(t, s.restore(routeLocalnet))
			known, err := newSettings(node, dir, never(t)).read()
			if want := (podnet.Sysctl{Name: "ipv4/ip_forward", Value: "0", Why: whyRebuilt}); err != nil || len(known) != 1 || known[0] != want {
				t.Errorf("recorded is %v, %v; want %v", known, err, want)
			}
			if aside, err := os.ReadFile(s.path + durable.Damaged); err != nil || !bytes.Equal(aside, data) {
				t.Errorf("set aside is %q, %v; want %q", aside, err, data)
			}
			if told != 1 {
				t.Errorf("told %d times", told)
			}
		})
	}
}

func FuzzParseSettings(f *testing.F) {
	f.Add([]byte(`[{"Name":"ipv4/ip_forward","Value":"0","Why":"as it was before Fathom's network came"}]`))
	f.Add([]byte(`[{"Name":"../kernel/core_pattern","Value":"x"}]`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		known, err := parseSettings(data)
		if err != nil && known != nil {
			t.Fatalf("both %v and %v", known, err)
		}
		for _, c := range known {
			if path := filepath.Join("/proc/sys/net", c.Name); !strings.HasPrefix(path, "/proc/sys/net/") && path != "/proc/sys/net" {
				t.Errorf("%q is %s", c.Name, path)
			}
		}
	})
}
