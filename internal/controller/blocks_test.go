package controller

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/internal/facts/ippool"
)

// TestRefusals: a block that stays refused is told once; one that was only seen before its pool, never; and who writes
// thousands gets an event a minute.
func TestRefusals(t *testing.T) {
	refused := func(node string, n int) ippool.RefusedBlock {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(n / 256), byte(n)}), 32)
		return ippool.RefusedBlock{Block: ippool.Block{Prefix: p, Name: ippool.BlockName(p), UID: types.UID(fmt.Sprint(node, n)), Pool: "x", Node: node}, Reason: ippool.UnknownPool, Text: "there is no such IPPool"}
	}
	var r refusals
	now := time.Unix(0, 0)
	step := func(after time.Duration, want string, list ...ippool.RefusedBlock) {
		t.Helper()
		now = now.Add(after)
		var got []string
		for _, e := range r.tell(list, now) {
			got = append(got, e.Object.Kind+" "+e.Object.Name+": "+e.Message)
		}
		if s := strings.Join(got, "\n"); s != want {
			t.Errorf("%q, want %q", s, want)
		}
	}
	step(0, "", refused("a", 1), refused("b", 2))
	step(settled/2, "", refused("a", 1)) // that of b has its pool now
	step(settled/2, `IPBlock 198.51.0.1-32: IPBlock 198.51.0.1-32 of pool "x" on node a is not used: there is no such IPPool`, refused("a", 1), refused("b", 2))
	step(time.Second, "", refused("a", 1))
	if r.wait() {
		t.Error("there is something to be told")
	}
	step(10*refusalPause, "", refused("a", 1))
	many := []ippool.RefusedBlock{refused("a", 1)}
	for n := range 1000 {
		many = append(many, refused("a", 10+n))
	}
	step(0, "", many...)
	step(settled, `IPBlock 198.51.0.10-32: IPBlock 198.51.0.10-32 of pool "x" on node a is not used: there is no such IPPool; `+
		`IPBlock 198.51.0.11-32 of pool "x" on node a is not used: there is no such IPPool; `+
		`IPBlock 198.51.0.12-32 of pool "x" on node a is not used: there is no such IPPool; and 997 more`, many...)
	step(time.Second, "", append(many, refused("a", 5000))...)
	step(settled, "", append(many, refused("a", 5000))...)
	step(refusalPause, `IPBlock 198.51.19.136-32: IPBlock 198.51.19.136-32 of pool "x" on node a is not used: there is no such IPPool`, append(many, refused("a", 5000))...)
	step(0, "")
	if r.wait() || len(r.since)+len(r.told) > 0 {
		t.Errorf("it remembers what is gone: %+v", r)
	}
}
