package podroute

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
)

// routeMessage is a route as the kernel tells it in a dump.
func routeMessage(family byte, to netip.Prefix, via netip.Addr, device uint32) []byte {
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[1], body[4], body[5], body[7] = family, byte(to.Bits()), unix.RT_TABLE_MAIN, podnet.RouteProtocol, unix.RTN_UNICAST
	binary.NativeEndian.PutUint32(body[8:], unix.RTNH_F_ONLINK)
	return nlmsg.New(unix.RTM_NEWROUTE, 0, body).Attr(unix.RTA_DST, to.Addr().AsSlice()).Attr(unix.RTA_GATEWAY, via.AsSlice()).Uint32(unix.RTA_OIF, device)[unix.NLMSG_HDRLEN:]
}

func TestParseRoute(t *testing.T) {
	to, via := netip.MustParsePrefix("10.244.2.0/24"), netip.MustParseAddr("10.0.0.2")
	whole := routeMessage(unix.AF_INET, to, via, 7)
	if r, ok := parseRoute(unix.AF_INET, whole); !ok || r.To != to || r.Via != via || r.device != 7 || !r.Onlink || r.Unreachable {
		t.Errorf("%+v, %v", r, ok)
	}
	if r, ok := parseRoute(unix.AF_INET6, whole); ok {
		t.Errorf("of another family: %+v", r)
	}
	for size := range whole { // nothing is read that is not there
		parseRoute(unix.AF_INET, whole[:size:size])
	}
	short := append(make([]byte, 0, 64), whole[:unix.SizeofRtMsg]...)
	short = nlmsg.Request(short).Attr(unix.RTA_OIF, []byte{1}).Attr(unix.RTA_PRIORITY, nil)
	if r, ok := parseRoute(unix.AF_INET, short); !ok || r.device != 0 || r.Metric != 0 {
		t.Errorf("with attributes that are too short: %+v, %v", r, ok)
	}
}

func FuzzRoute(f *testing.F) {
	f.Add(routeMessage(unix.AF_INET, netip.MustParsePrefix("10.244.2.0/24"), netip.MustParseAddr("10.0.0.2"), 7))
	f.Add(routeMessage(unix.AF_INET6, netip.MustParsePrefix("fd00:244:2::/64"), netip.MustParseAddr("fd00::2"), 7))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
			if r, ok := parseRoute(family, b); !ok && r != (routeFound{}) {
				t.Errorf("nothing, and %+v", r)
			}
		}
	})
}

func FuzzNeighbour(f *testing.F) {
	body := make([]byte, unix.SizeofNdMsg)
	body[4] = 7
	f.Add([]byte(nlmsg.New(unix.RTM_NEWNEIGH, 0, body).Attr(unix.NDA_DST, []byte{10, 0, 0, 2}).Attr(unix.NDA_LLADDR, []byte{2, 0, 0, 0, 0, 1})[unix.NLMSG_HDRLEN:]))
	f.Fuzz(func(t *testing.T, b []byte) {
		if isNeighbourOf(b, 7) {
			parseNeighbour(b)
		}
	})
}
