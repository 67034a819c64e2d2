package topology

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the .txt files beside the lab files in testdata/invalid")

// TestInvalid has each lab file of testdata/invalid beside the whole text of its error.
func TestInvalid(t *testing.T) {
	files, err := filepath.Glob("testdata/invalid/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("find the lab files: %v, %d of them", err, len(files))
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			lab, err := Parse(data, "lab.yaml", Overrides{})
			if lab != nil || err == nil {
				t.Fatalf("got lab %v and error %v, want an error only", lab, err)
			}
			if !IsInvalid(err) {
				t.Errorf("IsInvalid(%v) is false", err)
			}
			golden := strings.TrimSuffix(file, ".yaml") + ".txt"
			got := err.Error() + "\n"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

func ptr[T any](v T) *T { return &v }

func TestInvalidFlags(t *testing.T) {
	const file = `apiVersion: fathom.network/v1alpha1
kind: Lab
clusters:
- name: east
  podCIDR: 10.1.0.0/16
  nodes:
  - name: worker2
    labels: {rack: a}
- name: west
  proxy: none
`
	tests := []struct {
		name string
		o    Overrides
		want string
	}{
		{"workers", Overrides{Workers: ptr(-1)}, `lab.yaml:7:11: clusters[0].nodes[0].name`},
		{"many workers", Overrides{Workers: ptr(300)}, `--workers: "300": want a number from 0 to 200`},
		{"fewer workers", Overrides{Workers: ptr(1)},
			`lab.yaml:7:11: clusters[0].nodes[0].name: "worker2": cluster east has no such node; --workers decides how many there are`},
		{"even", Overrides{ControlPlanes: ptr(2)},
			`--control-planes: "2": an even number loses etcd's majority as easily as one less; want 1, 3, 5 or 7`},
		{"network", Overrides{Network: "flanel"}, `--network: "flanel": unknown network; did you mean flannel?`},
		{"proxy", Overrides{Proxy: "envoy"}, `--proxy: "envoy": unknown proxy; want fathom, kube-proxy or none`},
		{"mode", Overrides{Clusters: []string{"east"}, ProxyMode: "nft"}, `--proxy-mode: "nft": unknown mode; want nftables, iptables or ipvs`},
		{"mode without proxy", Overrides{ProxyMode: "ipvs"},
			`--proxy-mode: "ipvs": the proxy none has no modes; leave it out`},
		{"family", Overrides{Clusters: []string{"west"}, IPFamily: "ipv5"}, `--ip-family: "ipv5": unknown IP family; did you mean ipv4?`},
		{"family of file", Overrides{IPFamily: "ipv6"},
			`lab.yaml:5:12: clusters[0].podCIDR: "10.1.0.0/16": want one IPv6 prefix, because --ip-family is ipv6`},
		{"pods", Overrides{PodCIDR: "10.1.2.3/16"}, `--pod-cidr: "10.1.2.3/16": host bits are set; want 10.1.0.0/16`},
		{"services", Overrides{ServiceCIDR: "x"}, `--service-cidr: "x": not a prefix; want something like 10.96.0.0/16`},
		{"underlay", Overrides{Underlay: "10.230.0.0/16,fd00::/64"}, `--underlay: "fd00::/64": want an IPv6 /48, such as fd00:fa:201::/48`},
		{"underlays", Overrides{Underlay: "10.230.0.0/16,10.231.0.0/16"}, `--underlay: "10.230.0.0/16,10.231.0.0/16": two IPv4 prefixes; want one of each family`},
		{"name", Overrides{Name: "My Lab"},
			`--name: "My Lab": not a name; want lower-case letters, digits and '-', beginning with a letter, at most 20 characters`},
		{"twice", Overrides{Clusters: []string{"a", "a"}}, `--clusters: "a": named twice; want each cluster to have a name of its own`},
	}
	tests[0].want = `--workers: "-1": want a number from 0 to 200`
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := Parse([]byte(file), "lab.yaml", test.o)
			if err == nil || err.Error() != test.want {
				t.Errorf("got  %v\nwant %s", err, test.want)
			}
		})
	}
}

func TestDNS(t *testing.T) {
	const file = `apiVersion: fathom.network/v1alpha1
kind: Lab
defaults: {proxy: fathom, dns: node-cache}
clusters:
- name: east
- name: west
  dns: cluster
`
	lab, err := Parse([]byte(file), "lab.yaml", Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	if east, west := lab.Clusters[0].DNS, lab.Clusters[1].DNS; east != DNSNodeCache || west != DNSCluster {
		t.Errorf("east has %s, west %s", east, west)
	}
	for _, tc := range []struct {
		o    Overrides
		want string
	}{
		{Overrides{DNS: "node-cache", Proxy: "kube-proxy"}, "want cluster"},
		{Overrides{DNS: "node"}, "unknown way to answer"},
	} {
		if _, err := Default(tc.o); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v, want %q", tc.o, err, tc.want)
		}
	}
}

func TestOverrides(t *testing.T) {
	const file = `apiVersion: fathom.network/v1alpha1
kind: Lab
defaults: {workers: 1, network: {name: flannel, vni: 7}}
clusters:
- name: east
  dnsDomain: east.local
- name: west
`
	lab, err := Parse([]byte(file), "lab.yaml", Overrides{
		Name: "other", Clusters: []string{"north", "east"}, ControlPlanes: ptr(3), Workers: ptr(0),
		Network: "flannel", Proxy: "kube-proxy", ProxyMode: "ipvs", IPFamily: "dual",
	})
	if err != nil {
		t.Fatal(err)
	}
	north, east := lab.Clusters[0], lab.Clusters[1]
	if lab.Name != "other" || north.Name != "north" || east.Name != "east" || len(lab.Clusters) != 2 {
		t.Errorf("got lab %s of %s and %s", lab.Name, north.Name, east.Name)
	}
	if east.DNSDomain != "east.local" || north.DNSDomain != "cluster.local" {
		t.Errorf("DNS domains: east has %s, north has %s", east.DNSDomain, north.DNSDomain)
	}
	for _, c := range lab.Clusters {
		if len(c.Nodes) != 3 || len(c.ControlPlanes()) != 3 || len(c.Families) != 2 {
			t.Errorf("%s has nodes %v and families %v", c.Name, c.Nodes, c.Families)
		}
		if c.Network.VNI != 7 || c.Proxy.Mode != "ipvs" {
			t.Errorf("%s has network %+v and proxy %+v", c.Name, c.Network, c.Proxy)
		}
	}
}

func TestNodeSettings(t *testing.T) {
	lab, err := Parse([]byte(`apiVersion: fathom.network/v1alpha1
kind: Lab
defaults:
  mounts: [{hostPath: /srv/a}]
  wire: {delay: 1ms}
  nodes:
  - name: worker1
    labels: {rack: a, zone: one}
    taints: ["dedicated=db:NoSchedule"]
clusters:
- name: east
  mounts: [{hostPath: /srv/b, nodePath: /srv/a, readOnly: true}]
  nodes:
  - name: east-worker1
    labels: {rack: b, "example.com/n": 3}
    wire: {rate: 10mbit, loss: 0.5}
- name: west
`), "lab.yaml", Overrides{})
	if err != nil {
		t.Fatal(err)
	}
	east, west := lab.Clusters[0].Nodes[1], lab.Clusters[1].Nodes[1]
	if east.Name != "east-worker1" || east.Labels["rack"] != "b" || east.Labels["zone"] != "one" || east.Labels["example.com/n"] != "3" {
		t.Errorf("%s has labels %v", east.Name, east.Labels)
	}
	if west.Labels["rack"] != "a" {
		t.Errorf("%s has labels %v", west.Name, west.Labels)
	}
	if want := (Taint{"dedicated", "db", "NoSchedule"}); len(east.Taints) != 1 || east.Taints[0] != want {
		t.Errorf("%s has taints %v", east.Name, east.Taints)
	}
	if want := (Mount{"/srv/b", "/srv/a", true}); len(east.Mounts) != 1 || east.Mounts[0] != want {
		t.Errorf("%s has mounts %v", east.Name, east.Mounts)
	}
	if want := (Mount{"/srv/a", "/srv/a", false}); len(west.Mounts) != 1 || west.Mounts[0] != want {
		t.Errorf("%s has mounts %v", west.Name, west.Mounts)
	}
	if want := (Wire{"10mbit", "", 0.5}); east.Wire != want {
		t.Errorf("%s has wire %v", east.Name, east.Wire)
	}
	if want := (Wire{"", "1ms", 0}); west.Wire != want {
		t.Errorf("%s has wire %v", west.Name, west.Wire)
	}
}

func TestControlPlaneTaints(t *testing.T) {
	standard := []Taint{{ControlPlaneTaint, "", "NoSchedule"}}
	for name, tc := range map[string]struct {
		cluster, taints string // beside the name; of the control-plane node's entry
		want            []Taint
	}{
		"by itself":             {"", "", standard},
		"an entry without":      {"", "labels: {a: b}", standard},
		"as kubeadm takes it":   {"", `taints: ["node-role.kubernetes.io/control-plane:NoSchedule"]`, standard},
		"as the API takes it":   {"", "taints: [{key: node-role.kubernetes.io/control-plane, effect: NoSchedule}]", standard},
		"none":                  {"", "taints: []", nil},
		"another in its place":  {"", `taints: ["dedicated=db:NoExecute"]`, []Taint{{"dedicated", "db", "NoExecute"}}},
		"alone":                 {"workers: 0", "", nil},
		"alone, and asked for":  {"workers: 0", `taints: ["node-role.kubernetes.io/control-plane:NoSchedule"]`, standard},
		"with others, by right": {"", `taints: ["node-role.kubernetes.io/control-plane:NoSchedule", "node-role.kubernetes.io/control-plane:NoExecute"]`, append(slices.Clone(standard), Taint{ControlPlaneTaint, "", "NoExecute"})},
	} {
		t.Run(name, func(t *testing.T) {
			file := "apiVersion: fathom.network/v1alpha1\nkind: Lab\nclusters:\n- name: east\n"
			if tc.cluster != "" {
				file += "  " + tc.cluster + "\n"
			}
			if tc.taints != "" {
				file += "  nodes:\n  - name: control-plane\n    " + tc.taints + "\n"
			}
			lab, err := Parse([]byte(file), "lab.yaml", Overrides{})
			if err != nil {
				t.Fatal(err)
			}
			nodes := lab.Clusters[0].Nodes
			if !slices.Equal(nodes[0].Taints, tc.want) {
				t.Errorf("the control-plane node has taints %v, want %v", nodes[0].Taints, tc.want)
			}
			for _, n := range nodes[1:] {
				if len(n.Taints) > 0 {
					t.Errorf("%s has taints %v", n.Name, n.Taints)
				}
			}
		})
	}
}

func TestParseClusters(t *testing.T) {
	tests := map[string]string{
		"1":        "east",
		"6":        "east west north south cluster5 cluster6",
		"a, b":     "a b",
		"17":       "--clusters: \"17\": want a number from 1 to 16, or names separated by commas",
		"0":        "--clusters: \"0\": want a number from 1 to 16, or names separated by commas",
		"a,a":      "--clusters: \"a\": named twice; want each cluster to have a name of its own",
		"East":     "--clusters: \"East\": " + wantShortLabel,
		"":         "--clusters: " + wantShortLabel,
		"east,2nd": "--clusters: \"2nd\": " + wantShortLabel,
	}
	for in, want := range tests {
		names, err := ParseClusters(in)
		got := strings.Join(names, " ")
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("ParseClusters(%q) = %s, want %s", in, got, want)
		}
	}
}

// TestGuide parses every lab file in the guide, whole ones as they are and fragments of fields as they
// would stand in a lab file.
func TestGuide(t *testing.T) {
	guide, err := os.ReadFile("../../../docs/lab-file.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(guide), "```yaml\n")[1:]
	if len(blocks) == 0 {
		t.Fatal("docs/lab-file.md has no yaml block")
	}
	for _, block := range blocks {
		block, _, closed := strings.Cut(block, "\n```")
		if !closed {
			t.Fatalf("a block is not closed: %s", block)
		}
		if _, err := Parse([]byte(block), "lab-file.md", Overrides{Dir: "/home/me"}); err != nil {
			t.Errorf("%v\nin\n%s", err, block)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"testdata/invalid/*.yaml", "../../../docs/lab-file.md"} {
		files, _ := filepath.Glob(pattern)
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			for block := range strings.SplitSeq(string(data), "```") {
				f.Add([]byte(strings.TrimPrefix(block, "yaml\n")))
			}
		}
	}
	f.Add([]byte("apiVersion: fathom.network/v1alpha1\nkind: Lab\na: &a [*a, *a]\nclusters: &c [{name: a, nodes: *c}, *c]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		lab, err := Parse(data, "lab.yaml", Overrides{})
		if (lab == nil) == (err == nil) {
			t.Fatalf("got lab %v and error %v, want exactly one", lab, err)
		}
		if err != nil && !IsInvalid(err) {
			t.Errorf("%v is not about the input", err)
		}
		if lab != nil {
			checkLab(t, lab)
		}
	})
}
