package packet

import (
	"net/netip"
	"strings"
	"testing"
)

// parts are made of what they answer, by destination port.
type part map[uint16][]Hop

func (t part) Explain(p Packet) []Hop { return t[p.Dst.Port()] }

func to(port uint16) Packet {
	return Packet{Dst: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port)}
}

func TestZeroValues(t *testing.T) {
	if v := (Hop{}).Verdict; v != Drop || !(Hop{}).Ends() {
		t.Errorf("a hop of which nothing is said is %s", v)
	}
	if o := (Packet{}).Origin; o != Elsewhere {
		t.Errorf("a packet of which nothing is said comes from %s", o)
	}
}

func TestFollow(t *testing.T) {
	split := part{80: {{Part: "split", Verdict: Translate, Out: []Packet{to(1), to(2), to(3)}}}}
	firewall := part{1: {{Part: "wall", Verdict: Drop}}, 2: {Passed(to(2), "wall", "", "")}}
	fast := part{2: {{Part: "fast", Verdict: Redirect}}}
	last := part{1: {Passed(to(1), "last", "", "")}, 2: {Passed(to(2), "last", "", "")}, 80: {Passed(to(80), "last", "", "")}}
	twice := part{3: {Passed(to(3), "first", "", ""), {Part: "second", Verdict: Reject}}}
	for _, tc := range []struct {
		parts []Part
		want  string
	}{
		{nil, "pass:80"},
		{[]Part{last}, "last pass:80"},
		{[]Part{split}, "split pass:1, split pass:2, split pass:3"},
		{[]Part{firewall, split, last}, "split last pass:1, split last pass:2, split pass:3"},
		{[]Part{split, firewall, fast, last, twice}, "split wall drop:1, split wall fast redirect:2, split first second reject:3"},
	} {
		var got []string
		for _, p := range Follow(to(80), tc.parts...) {
			var words []string
			for _, h := range p.Hops {
				words = append(words, h.Part)
			}
			got = append(got, strings.Join(append(words, p.Verdict().String()+p.End.Dst.String()[len("192.0.2.1"):]), " "))
		}
		if s := strings.Join(got, ", "); s != tc.want {
			t.Errorf("got %q, want %q", s, tc.want)
		}
	}
}
