package conflist_test

import (
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/ipam"
)

var full = conflist.Config{
	MTU:           1450,
	NodeAddresses: []netip.Addr{netip.MustParseAddr("10.201.1.3"), netip.MustParseAddr("fd00::3")},
	Pools: []ipam.Pool{
		{Name: "default", Ranges: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")}},
		{Name: "public", Ranges: []netip.Prefix{netip.MustParsePrefix("192.0.2.8/32")}, ExplicitOnly: true},
	},
	DataDir: "/var/lib/cni/fathom", CoolDown: 10 * time.Second, AgentSocket: "/run/fathom/agent.sock", AgentRequired: true, Isolates: true,
}

// TestRoundTrip reads what the agent writes, the way a runtime takes it apart.
func TestRoundTrip(t *testing.T) {
	for _, c := range []conflist.Config{full, {DataDir: "/x", CoolDown: time.Second}} {
		data, err := conflist.Marshal("fathom", c)
		if err != nil {
			t.Fatal(err)
		}
		var list struct {
			CNIVersion, Name string
			Plugins          []json.RawMessage
		}
		if err := json.Unmarshal(data, &list); err != nil || list.CNIVersion != "1.1.0" || list.Name != "fathom" || len(list.Plugins) != 3 {
			t.Fatalf("%v\n%s", err, data)
		}
		got, err := conflist.Parse(list.Plugins[0])
		if err != nil || !reflect.DeepEqual(got, c) {
			t.Errorf("%+v comes back as %+v, %v", c, got, err)
		}
	}
}

func TestDefaults(t *testing.T) {
	c, err := conflist.Parse([]byte(`{"type":"fathom-cni"}`))
	want := conflist.Config{DataDir: conflist.DefaultDataDir, CoolDown: conflist.DefaultCoolDown}
	if err != nil || !reflect.DeepEqual(c, want) {
		t.Errorf("%+v, %v; want %+v", c, err, want)
	}
}

func TestProblems(t *testing.T) {
	for _, test := range []struct {
		config string
		want   []string // the paths
	}{
		{`{"mtu":12,"dataDir":"x","agentSocket":"y","coolDown":"-3s"}`, []string{"mtu", "dataDir", "agentSocket", "coolDown"}},
		{`{"coolDown":"soon","nodeAddresses":["one"],"pools":[{"name":"a","ranges":["10.1.0.0"]}]}`, []string{"coolDown", "nodeAddresses[0]", "pools[0].ranges[0]"}},
		{`{"nodeAddresses":["10.0.0.1","10.0.0.2","fe80::1%eth0","::ffff:10.0.0.3"]}`, []string{"nodeAddresses[1]", "nodeAddresses[2]", "nodeAddresses[3]"}},
		{`{"nodeAddresses":["10.0.0.1"],"pools":[{"ranges":["10.1.0.1/24"]},{"name":"b","ranges":["fd00::/64"]},{"name":"b"}]}`,
			[]string{"pools[0].name", "pools[0].ranges[0]", "pools[1].ranges[0]", "pools[2].name"}},
		{`{"nodeAddresses":["10.0.0.1"],"pools":[{"name":"a","ranges":["10.1.0.0/24","10.0.0.0/24"]},{"name":"b","ranges":["10.1.0.128/25","169.254.3.0/24"]}]}`,
			[]string{"pools[0].ranges[1]", "pools[1].ranges[0]", "pools[1].ranges[1]"}},
		{`{"mtu":1000,"nodeAddresses":["fd00::1"],"pools":[{"name":"a","ranges":["fd01::/64"]}]}`, []string{"pools[0].ranges[0]"}},
		{`{"mtu":"1450"}`, []string{""}},
		{`[`, []string{""}},
	} {
		_, err := conflist.Parse([]byte(test.config))
		var invalid *conflist.InvalidError
		if !errors.As(err, &invalid) {
			t.Errorf("%s: %v", test.config, err)
			continue
		}
		var paths []string
		for _, p := range invalid.Problems {
			paths = append(paths, p.Path)
			if !strings.Contains(err.Error(), p.String()) || p.Message == "" {
				t.Errorf("%q says nothing of %q", err, p)
			}
		}
		if !slices.Equal(paths, test.want) {
			t.Errorf("%s: problems at %q, want %q: %v", test.config, paths, test.want, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	data, err := conflist.Marshal("fathom", full)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"type":"fathom-cni","mtu":1450,"nodeAddresses":["10.201.1.3"],"pools":[{"name":"default","ranges":["10.244.1.0/24"]}],"coolDown":"1s"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := conflist.Parse(data)
		if err != nil {
			if !reflect.DeepEqual(c, conflist.Config{}) {
				t.Errorf("both %+v and %v", c, err)
			}
			return
		}
		if err := c.Validate(); err != nil {
			t.Errorf("parsed, and not valid: %v", err)
		}
		if _, err := conflist.Marshal("n", c); err != nil {
			t.Error(err)
		}
	})
}
