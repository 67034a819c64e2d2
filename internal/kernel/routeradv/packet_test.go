package routeradv

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"testing"
	"time"
)

// Advertisements as FRR 8.4 and radvd send them, without and with a prefix and servers.
const (
	ofFRR   = "8600a2b64000001e0000000000000000" + "010142b7a9558869"
	ofRadvd = "8600000040c007080000000000000000" + "030440c0000151800000384000000000fd000001000000000000000000000000" + "0501000000000578" + "0101020000000001"
)

var routerAddr = netip.MustParseAddr("fe80::1")

func packet(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParse(t *testing.T) {
	a, ok := parse(packet(t, ofFRR), routerAddr.WithZone("eth0"), 255)
	if want := (advertisement{from: routerAddr, mac: [6]byte{0x42, 0xb7, 0xa9, 0x55, 0x88, 0x69}}); !ok || a != want {
		t.Errorf("FRR's is %v %+v", ok, a)
	}
	a, ok = parse(packet(t, ofRadvd), routerAddr, 255)
	if want := (advertisement{from: routerAddr, mac: [6]byte{2, 0, 0, 0, 0, 1}}); !ok || a != want {
		t.Errorf("radvd's is %v %+v", ok, a)
	}
	mac := []byte{2, 0, 0, 0, 0, 2}
	a, ok = parse(advertise(mac), routerAddr, 255)
	if want := (advertisement{from: routerAddr, mac: [6]byte(mac), node: true}); !ok || a != want {
		t.Errorf("a node's is %v %+v", ok, a)
	}
	// All that a host could take from it is zero: RFC 4861, 4.2.
	if b := advertise(mac); !bytes.Equal(b[2:advertiseHeader], make([]byte, advertiseHeader-2)) || len(b)%8 != 0 {
		t.Errorf("a node advertises %x", b)
	}
	if b := advertise(nil); len(b) != advertiseHeader+8 { // of a device without Ethernet addresses
		t.Errorf("a node advertises %x", b)
	}
	for name, wrong := range map[string]struct {
		packet []byte
		from   string
		hops   int
	}{
		"from further away":           {packet(t, ofFRR), "fe80::1", 254},
		"from a global address":       {packet(t, ofFRR), "fd00::1", 255},
		"from IPv4":                   {packet(t, ofFRR), "169.254.0.1", 255},
		"solicitation":                {solicit(mac), "fe80::1", 255},
		"another code":                {append([]byte{134, 1}, packet(t, ofFRR)[2:]...), "fe80::1", 255},
		"cut in the header":           {packet(t, ofFRR)[:15], "fe80::1", 255},
		"cut in an option":            {packet(t, ofFRR)[:23], "fe80::1", 255},
		"an option of length 0":       {append(packet(t, ofFRR), 253, 0, 0, 0, 0, 0, 0, 0), "fe80::1", 255},
		"an option beyond the packet": {append(packet(t, ofFRR), 253, 2, 0, 0, 0, 0, 0, 0), "fe80::1", 255},
	} {
		if a, ok := parse(wrong.packet, netip.MustParseAddr(wrong.from), wrong.hops); ok {
			t.Errorf("%s is taken for %+v", name, a)
		}
	}
}

// FuzzParse: what is no advertisement is nothing, and what is has a link-local address.
func FuzzParse(f *testing.F) {
	for _, s := range []string{ofFRR, ofRadvd, "", "86"} {
		f.Add(packet(f, s))
	}
	f.Add(advertise([]byte{2, 0, 0, 0, 0, 2}))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, ok := parse(b, routerAddr.WithZone("eth0"), 255)
		if ok && (a.from != routerAddr || b[0] != advertiseType) || !ok && a != (advertisement{}) {
			t.Errorf("%x is %v %+v", b, ok, a)
		}
	})
}

func TestHeard(t *testing.T) {
	type step struct {
		after time.Duration // the one before
		from  string
		mac   byte
		node  bool
		// What is so afterwards.
		router, other string
		asks          bool
	}
	for name, steps := range map[string][]step{
		"nodes are no routers":        {{from: "fe80::9", mac: 9, node: true, asks: true}, {from: "fe80::1", mac: 1, router: "fe80::1"}, {from: "fe80::9", mac: 9, node: true, router: "fe80::1"}},
		"a router that falls silent":  {{from: "fe80::1", mac: 1, router: "fe80::1"}, {after: time.Hour, from: "fe80::1", mac: 1, router: "fe80::1"}},
		"the same at another address": {{from: "fe80::1", mac: 1, router: "fe80::1"}, {from: "fe80::2", mac: 1, router: "fe80::2"}},
		"one with two addresses is not gone to and fro with": {{from: "fe80::1", mac: 1, router: "fe80::1"}, {from: "fe80::2", mac: 1, router: "fe80::2"},
			{from: "fe80::1", mac: 1, router: "fe80::2", asks: true}, {from: "fe80::2", mac: 1, router: "fe80::2", other: "fe80::1"}},
		"another in its place": {{from: "fe80::1", mac: 1, router: "fe80::1"}, {after: time.Second, from: "fe80::2", mac: 2, router: "fe80::1", asks: true},
			{after: patience - 1, from: "fe80::2", mac: 2, router: "fe80::1", asks: true}, {after: 1, from: "fe80::2", mac: 2, router: "fe80::2"}},
		"another beside it, which says more": {{from: "fe80::1", mac: 1, router: "fe80::1"}, {from: "fe80::2", mac: 2, router: "fe80::1", asks: true},
			{after: 9 * time.Second, from: "fe80::1", mac: 1, router: "fe80::1", other: "fe80::2"},
			{after: 9 * time.Second, from: "fe80::2", mac: 2, router: "fe80::1", other: "fe80::2", asks: true},
			{after: 9 * time.Second, from: "fe80::2", mac: 2, router: "fe80::1", other: "fe80::2", asks: true}},
		"without Ethernet addresses": {{from: "fe80::1", router: "fe80::1"}, {from: "fe80::2", router: "fe80::1", asks: true}, {after: patience, from: "fe80::2", router: "fe80::2"}},
	} {
		t.Run(name, func(t *testing.T) {
			var h heard
			if !h.asks() {
				t.Error("nobody is asked where nobody was heard")
			}
			text := func(a netip.Addr) string {
				if !a.IsValid() {
					return ""
				}
				return a.String()
			}
			now := time.Unix(1, 0)
			for i, s := range steps {
				now = now.Add(s.after)
				before := h.router
				changed := h.hear(advertisement{from: netip.MustParseAddr(s.from), mac: [6]byte{5: s.mac}, node: s.node}, now)
				if text(h.router) != s.router || text(h.other) != s.other || h.asks() != s.asks || changed != (before != h.router) {
					t.Errorf("step %d: changed %v, asks %v, %+v", i, changed, h.asks(), h)
				}
			}
		})
	}
}
