package ruleset_test

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
)

func TestSetUntracked(t *testing.T) {
	n, r := space(t)
	testenv.Must(t, n.SetUp("lo", true))
	addrs := []netip.Addr{netip.MustParseAddr("169.254.20.10"), netip.MustParseAddr("fd66:6174:686f:6d::a")}
	_, err := n.SetNodeCacheAddrs(addrs)
	testenv.Must(t, err)
	// Connection tracking works in a namespace while a rule needs it.
	nft(t, n, "add table inet other; add chain inet other input { type filter hook input priority 0; }; add rule inet other input ct state new counter")
	tracked := func() int {
		ping := exec.Command("sh", "-c", "ping -c1 -W5 169.254.20.10 >/dev/null; ping -c1 -W5 fd66:6174:686f:6d::a >/dev/null")
		testenv.Must(t, n.Start(ping))
		testenv.Must(t, ping.Wait())
		return strings.Count(nft(t, n, "list chain inet other input"), "packets 0 ")
	}
	if tracked() != 0 {
		t.Error("nothing is tracked without the table: the test proves nothing")
	}
	for want := range []int{2, 0} {
		count, err := r.SetUntracked(addrs)
		testenv.Must(t, err)
		if got := count.Added + count.Removed + count.Corrected; (got == 0) != (want == 1) {
			t.Errorf("call %d changed %d", want, got)
		}
	}
	nft(t, n, "flush chain inet other input; add rule inet other input ct state new counter")
	if tracked() != 1 {
		t.Errorf("packets to the cache are tracked:\n%s", nft(t, n, "list ruleset"))
	}
	for range 2 {
		_, err := r.SetUntracked(nil)
		testenv.Must(t, err)
	}
	if out := nft(t, n, "list tables"); strings.Contains(out, ruleset.DNSTable) {
		t.Errorf("the table is left over: %s", out)
	}
}
