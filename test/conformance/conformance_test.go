package main

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var rewrite = flag.Bool("update", false, "rewrite the golden files")

func testdata(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestParseList(t *testing.T) {
	specs := parseList(testdata(t, "specs.txt"))
	want := []string{
		"DNS should provide DNS for services [Conformance]",
		"DNS should provide DNS for the cluster [Provider:GCE]",
		"LoadBalancers [Feature:LoadBalancer] should be able to change the type and ports of a TCP service [Slow]",
		"Services should serve a basic endpoint from pods [Conformance]",
		"Services should work after restarting kube-proxy [Disruptive]",
	}
	if !slices.Equal(specs, want) {
		t.Errorf("got %q, want %q", specs, want)
	}
}

func TestReadReport(t *testing.T) {
	got, err := readReport(bytes.NewReader(testdata(t, "report.json")))
	if err != nil {
		t.Fatal(err)
	}
	want := results{
		{"Services should serve a basic endpoint from pods [Conformance]", passedOutcome, ""},
		{"DNS should provide DNS for services [Conformance]", failedOutcome, "dig | nslookup <nothing>: (dns_common.go:546)"},
		{"DNS should provide DNS for the cluster [Provider:GCE]", leftOutOutcome, "upstream: Only supported for providers [gce] (not skeleton)"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
	if missing := without([]string{want[0].Spec, "another"}, got); !slices.Equal(missing, []string{"another"}) {
		t.Errorf("without a result: %q", missing)
	}

	if _, err := readReport(bytes.NewReader(testdata(t, "report-interrupted.json"))); !errors.Is(err, errInterrupted) {
		t.Errorf("interrupted: got %v", err)
	}
	_, err = readReport(bytes.NewReader(testdata(t, "report-notready.json")))
	if err == nil || !strings.Contains(err.Error(), "timed out waiting for nodes to be ready") {
		t.Errorf("a suite that did not begin: got %v", err)
	}
	if _, err := readReport(strings.NewReader(`[{"SpecReports": [`)); err == nil {
		t.Error("a report that is cut off is taken for whole")
	}
}

// TestScoreboard plays the history of a scoreboard and compares each of its states.
func TestScoreboard(t *testing.T) {
	specs := parseList(testdata(t, "specs.txt"))
	ran, err := readReport(bytes.NewReader(testdata(t, "report.json")))
	if err != nil {
		t.Fatal(err)
	}
	plain := setting{}.withDefaults()
	left := results{{specs[2], leftOutOutcome, leftOut(specs[2], plain, machine{})}}
	file := filepath.Join(t.TempDir(), "conformance.md")
	if err := os.WriteFile(file, testdata(t, "before.md"), 0o644); err != nil {
		t.Fatal(err)
	}
	day := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	for _, step := range []struct {
		golden  string
		s       setting
		version string
		ran     results
	}{
		{"first.md", plain, "v1.36.3", slices.Concat(ran, left)},
		// A subset changes its own rows, and no others; what it leaves out keeps the result that it had.
		{"subset.md", plain, "v1.36.3", results{{specs[0], passedOutcome, ""}, {specs[3], leftOutOutcome, "not asked for"}}},
		{"another-setting.md", setting{Network: "none", Proxy: "none"}.withDefaults(), "v1.36.3", results{{specs[3], failedOutcome, `a\b | c`}}},
		// Of an older version nothing is kept.
		{"another-version.md", plain, "v1.37.0", results{{specs[0], passedOutcome, ""}}},
	} {
		if err := record(file, step.s, step.version, day, specs, step.ran); err != nil {
			t.Fatalf("%s: %v", step.golden, err)
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if *rewrite {
			if err := os.WriteFile(filepath.Join("testdata", step.golden), got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want := testdata(t, step.golden); !bytes.Equal(got, want) {
			t.Errorf("%s: got\n%s\nwant\n%s", step.golden, got, want)
		}
		if err := record(file, step.s, step.version, day, specs, step.ran); err != nil {
			t.Fatal(err)
		}
		if again, _ := os.ReadFile(file); !bytes.Equal(again, got) {
			t.Errorf("%s: the same run once more changes the scoreboard to\n%s", step.golden, again)
		}
		day = day.AddDate(0, 0, 1)
	}
}

func TestScoreboardIsNotGuessed(t *testing.T) {
	for name, doc := range map[string]string{
		"no marks":              "# Conformance\n",
		"no end":                boardBegin + "\n",
		"what it did not write": boardBegin + "\n### a, b, c\n\nSomebody's remark.\n" + boardEnd,
		"before any section":    boardBegin + "\nSomebody's remark.\n" + boardEnd,
	} {
		if got, err := update([]byte(doc), setting{}, "v1", "2026-01-01", nil, nil); err == nil {
			t.Errorf("%s: got\n%s\nwant an error", name, got)
		}
	}
}

func TestLeftOut(t *testing.T) {
	bridge := setting{Network: "bridge"}.withDefaults()
	dual := setting{Family: "dual"}.withDefaults()
	own := setting{Network: "none"}.withDefaults()
	full := machine{sctp: true, forwards: true, internet: true, names: true, iperf: "2.2.0"}
	for _, tc := range []struct {
		spec string
		s    setting
		m    machine
		want string // a part of the reason
	}{
		{"Services should serve a basic endpoint from pods [Conformance]", bridge, machine{}, ""},
		{"Services x [Feature:SCTPConnectivity]", bridge, full, ""},
		{"Services x [Feature:SCTPConnectivity]", bridge, machine{}, "SCTP"},
		{"Netpol x [Feature:NetworkPolicy]", bridge, full, "bridge has no NetworkPolicy"},
		{"Netpol x [Feature:NetworkPolicy]", own, full, ""},
		{"Netpol [Feature:SCTPConnectivity] x [Feature:NetworkPolicy]", own, machine{}, "SCTP"},
		{"LoadBalancers [Feature:LoadBalancer] x", bridge, full, "LoadBalancer"},
		{"[Feature:IPv6DualStack] x", bridge, full, "dual"},
		{"[Feature:IPv6DualStack] x", dual, full, ""},
		{"Networking x [Feature:Networking-IPv4]", bridge, full, ""},
		{"Networking x [Feature:Networking-IPv4]", bridge, machine{}, "ip_forward"},
		{"Networking x [Feature:Networking-IPv4]", bridge, machine{forwards: true}, "no way"},
		{"Networking x [Feature:Networking-DNS]", bridge, machine{forwards: true, internet: true}, "google.com"},
		{"DNS configMap nameserver x should forward PTR records lookup to upstream nameserver [Slow] [Serial]", bridge, machine{internet: true}, "8.8.8.8"},
		{"DNS configMap nameserver x should forward PTR records lookup to upstream nameserver [Slow] [Serial]", bridge, full, ""},
		{"Networking x [Feature:Networking-IPv6] [Experimental]", bridge, full, "IPv6"},
		{"Networking IPerf2 [Feature:Networking-Performance] x", bridge, full, ""},
		{"Networking IPerf2 [Feature:Networking-Performance] x", bridge, machine{iperf: "2.1.8"}, "2.1.8"},
		{"Networking IPerf2 [Feature:Networking-Performance] x", bridge, machine{}, "none"},
	} {
		got := leftOut(tc.spec, tc.s, tc.m)
		if (got == "") != (tc.want == "") || !strings.Contains(got, tc.want) {
			t.Errorf("%s in %s: got %q, want %q in it", tc.spec, tc.s, got, tc.want)
		}
	}
}

func TestChoose(t *testing.T) {
	specs := parseList(testdata(t, "specs.txt"))
	for _, tc := range []struct {
		args         []string
		chosen, left int
		problem      string
	}{
		{nil, 2, 0, ""},
		{[]string{"--focus", ""}, 2, 0, ""},
		{[]string{"--focus", "."}, 5, 0, ""},
		{[]string{"--focus", ".", "--network", "bridge"}, 4, 1, ""},
		{[]string{"--focus", ".", "--all"}, 5, 0, ""},
		{[]string{"--focus", ".", "--skip", "^DNS"}, 3, 0, ""},
		{[]string{"--focus", "no such spec"}, 0, 0, "no spec matches"},
		{[]string{"--short"}, 0, 0, "the short list has"},
	} {
		o, err := parse(tc.args, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		chosen, left, err := choose(specs, o, machine{})
		if len(chosen) != tc.chosen || len(left) != tc.left || (err != nil) != (tc.problem != "") || err != nil && !strings.Contains(err.Error(), tc.problem) {
			t.Errorf("%q: %d chosen, %d left out, %v", tc.args, len(chosen), len(left), err)
		}
	}
	for _, args := range [][]string{{"--focus", "("}, {"--workers", "0"}, {"--procs", "0"}, {"what"}, {"--no-such-flag"}} {
		if _, err := parse(args, io.Discard); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}

func TestSettings(t *testing.T) {
	for _, tc := range []struct {
		s         setting
		name, dir string
	}{
		{setting{}, "fathom, fathom auto, ipv4", "fathom-fathom-auto-ipv4"},
		{setting{Proxy: "kube-proxy"}, "fathom, kube-proxy nftables, ipv4", "fathom-kube-proxy-nftables-ipv4"},
		{setting{Mode: "ipvs"}, "fathom, kube-proxy ipvs, ipv4", "fathom-kube-proxy-ipvs-ipv4"},
		{setting{Network: "flannel", Mode: "iptables", Family: "dual"}, "flannel, kube-proxy iptables, dual", "flannel-kube-proxy-iptables-dual"},
		{setting{Network: "none", Proxy: "none", Mode: "iptables"}, "no network, no proxy, ipv4", "none-none-ipv4"},
	} {
		s := tc.s.withDefaults()
		if s.String() != tc.name || s.dirName() != tc.dir {
			t.Errorf("%+v: %q in %q", s, s.String(), s.dirName())
		}
	}
}

func TestProgress(t *testing.T) {
	var out, log bytes.Buffer
	p := &progress{out: &out, log: &log, total: 4, start: time.Now()}
	said := "Running in parallel across 6 processes\n• [1.234 seconds]\n[sig-network] DNS should provide DNS for services [Conformance] [sig-network, Conformance]\n" +
		"------\n• [FAILED] [149.8 seconds]\n[sig-network] Services [It] should be able to up and down services [sig-network]\n" +
		"S [SKIPPED] [0.003 seconds]\n[sig-network] Topology Hints [It] should distribute endpoints evenly [sig-network]\n• [0.5 seconds]\nsomething else\n" +
		"------\n[sig-network] Services should work after restarting kube-proxy [Disruptive] [sig-network, Disruptive]\nservice.go:1207\n  STEP: x\n• [33.428 seconds]\n------\n"
	for _, b := range []byte(said) { // lines come in pieces
		if _, err := p.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	if log.String() != said {
		t.Errorf("the log has\n%s", log.String())
	}
	want := "   0s   1/4 passed    1.2s  DNS should provide DNS for services [Conformance]\n" +
		"   0s   2/4 failed  149.8s  Services should be able to up and down services\n" +
		"   0s   3/4 skipped   0.0s  Topology Hints should distribute endpoints evenly\n" +
		"   0s   4/4 passed   33.4s  Services should work after restarting kube-proxy [Disruptive]\n"
	if out.String() != want {
		t.Errorf("got\n%s, want\n%s", out.String(), want)
	}
}
