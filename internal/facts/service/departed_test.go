package service

import (
	"net/netip"
	"testing"
)

// TestDeparturesAreBounded: the oldest address is dropped, also if one address goes repeatedly.
func TestDeparturesAreBounded(t *testing.T) {
	var d departures
	terminating := Condition{Terminating: true}
	one := func(i int) *Slice {
		return &Slice{Endpoints: []Endpoint{{Addr: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), Condition: terminating}}}
	}
	const n = 3 * departuresKept
	for i := range n {
		d.note(one(i), nil)
		d.note(one(i), nil)
	}
	if len(d.addrs) != departuresKept || len(d.order) != departuresKept || d.count != 2*n {
		t.Errorf("%d addresses, %d in order, %d counted", len(d.addrs), len(d.order), d.count)
	}
	for i, want := range map[int]bool{n - 1: true, n - departuresKept: true, n - departuresKept - 1: false} {
		if got := d.has(one(i).Endpoints[0].Addr); got != want {
			t.Errorf("the departure %d of %d is remembered: %t", i, n, got)
		}
	}
}

// TestTCPEnds: the same rule holds for sockets that are balanced at connect() and for tracked flows.
func TestTCPEnds(t *testing.T) {
	x := NewIndex(stalePlan(), staleRanges, staleOthers)
	to, from := netip.MustParseAddrPort("10.96.0.10:53"), netip.MustParseAddrPort("10.244.9.9:53")
	for life, want := range map[Life]bool{
		{}: false, {Present: true}: false, {Present: true, Serving: true}: false, {Gone: true}: true,
	} {
		lives := func(Name, netip.AddrPort) Life { return life }
		if x.Ended(TCP, to, from, true, lives) != want || x.Cut(TCP, to, from, lives) != want {
			t.Errorf("%+v: by connection tracking %t, of sockets %t, want %t", life, x.Ended(TCP, to, from, true, lives), x.Cut(TCP, to, from, lives), want)
		}
		for what, ended := range map[string]bool{
			"not translated":                x.Ended(TCP, to, from, false, lives),
			"of no Service":                 x.Ended(TCP, netip.MustParseAddrPort("192.0.2.1:8080"), from, true, lives),
			"of a Service that was deleted": x.Cut(TCP, netip.MustParseAddrPort("10.96.0.99:53"), from, lives),
		} {
			if ended {
				t.Errorf("%+v: a connection that is %s is ended", life, what)
			}
		}
	}
}
