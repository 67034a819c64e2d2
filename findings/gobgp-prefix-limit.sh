#!/bin/sh
# A session that GoBGP ends for its own prefix limit is reported as one whose connection broke.
#
# Library:  github.com/osrg/gobgp/v4 v4.8.0, pkg/server.
# Expected: WatchEvent tells why a session went down. The router is told Cease, "Maximum Number of Prefixes Reached" (RFC 4486,
#           6/1), so the reason is NOTIFICATION_SENT with that text, as there is one for it.
# Instead:  it is READ_FAILED, "read-failed", and with graceful restart GRACEFUL_RESTART, "graceful-restart": what it is when
#           a cable is pulled. That the limit was reached is in the log alone.
# Means:    a program that shows its users why a session is down shows a fault of the network, and they look for one. It has
#           to read the library's log to tell the two apart.
#
# Needs Go; no root.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
export CGO_ENABLED=0 GOWORK=off GOFLAGS=-mod=mod

cat >main.go <<'EOF'
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"
)

func check(err error) {
	if err != nil {
		fmt.Println("not shown:", err)
		os.Exit(1)
	}
}

func read(c net.Conn) (*bgp.BGPMessage, error) {
	header := make([]byte, bgp.BGP_HEADER_LENGTH)
	if _, err := io.ReadFull(c, header); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint16(header[16:]))
	copy(message, header)
	if _, err := io.ReadFull(c, message[len(header):]); err != nil {
		return nil, err
	}
	return bgp.ParseBGPMessage(message)
}

func write(c net.Conn, m *bgp.BGPMessage) {
	b, err := m.Serialize()
	check(err)
	_, err = c.Write(b)
	check(err)
}

// router takes one session, announces three prefixes in it, and tells what it is told at the end.
func router(l net.Listener, told chan<- string) {
	check(l.(*net.TCPListener).SetDeadline(time.Now().Add(time.Minute)))
	c, err := l.Accept()
	check(err)
	defer c.Close()
	_, err = read(c)
	check(err)
	open, err := bgp.NewBGPOpenMessage(65002, 90, netip.MustParseAddr("192.0.2.2"), []bgp.OptionParameterInterface{
		bgp.NewOptionParameterCapability([]bgp.ParameterCapabilityInterface{
			bgp.NewCapMultiProtocol(bgp.RF_IPv4_UC), bgp.NewCapFourOctetASNumber(65002),
			bgp.NewCapGracefulRestart(false, false, 120, []*bgp.CapGracefulRestartTuple{bgp.NewCapGracefulRestartTuple(bgp.RF_IPv4_UC, true)}),
		}),
	})
	check(err)
	write(c, open)
	write(c, bgp.NewBGPKeepAliveMessage())
	hop, err := bgp.NewPathAttributeNextHop(netip.MustParseAddr("192.0.2.2"))
	check(err)
	attributes := []bgp.PathAttributeInterface{bgp.NewPathAttributeOrigin(0),
		bgp.NewPathAttributeAsPath([]bgp.AsPathParamInterface{bgp.NewAs4PathParam(2, []uint32{65002})}), hop}
	var prefixes []bgp.PathNLRI
	for i := range 3 {
		n, err := bgp.NewIPAddrPrefix(netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), 32))
		check(err)
		prefixes = append(prefixes, bgp.PathNLRI{NLRI: n})
	}
	write(c, bgp.NewBGPUpdateMessage(nil, attributes, prefixes))
	for {
		m, err := read(c)
		if err != nil {
			told <- "nothing"
			return
		}
		if n, ok := m.Body.(*bgp.BGPNotification); ok {
			told <- fmt.Sprintf("NOTIFICATION %d/%d", n.ErrorCode, n.ErrorSubcode)
			return
		}
	}
}

// end is how a session with a limit of two prefixes went down: what the router is told, and the program.
func end(graceful bool) (routerTold, program string) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	check(err)
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s := server.NewBgpServer(server.LoggerOption(slog.New(slog.DiscardHandler), nil))
	go s.Serve()
	defer s.Stop()
	check(s.StartBgp(ctx, &api.StartBgpRequest{Global: &api.Global{Asn: 65001, RouterId: "192.0.2.1", ListenPort: -1}}))
	down, up := make(chan apiutil.PeerState, 1), false
	check(s.WatchEvent(ctx, server.WatchEventMessageCallbacks{OnPeerUpdate: func(e *apiutil.WatchEventMessage_PeerEvent, _ time.Time) {
		if e.Type != apiutil.PEER_EVENT_STATE {
			return
		}
		if e.Peer.State.SessionState == bgp.BGP_FSM_ESTABLISHED {
			up = true
		} else if up {
			select {
			case down <- e.Peer.State:
			default:
			}
		}
	}}, server.WatchPeer()))
	family := &api.Family{Afi: api.Family_AFI_IP, Safi: api.Family_SAFI_UNICAST}
	check(s.AddPeer(ctx, &api.AddPeerRequest{Peer: &api.Peer{
		Conf:            &api.PeerConf{NeighborAddress: "127.0.0.1", PeerAsn: 65002},
		Transport:       &api.Transport{RemotePort: uint32(l.Addr().(*net.TCPAddr).Port)},
		Timers:          &api.Timers{Config: &api.TimersConfig{ConnectRetry: 1, IdleHoldTimeAfterReset: 1}},
		GracefulRestart: &api.GracefulRestart{Enabled: graceful, RestartTime: 120},
		AfiSafis: []*api.AfiSafi{{
			Config:            &api.AfiSafiConfig{Family: family, Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: graceful}},
			PrefixLimits:      &api.PrefixLimit{Family: family, MaxPrefixes: 2},
		}},
	}}))
	told := make(chan string, 1)
	go router(l, told)
	select {
	case p := <-down:
		return <-told, fmt.Sprintf("%s %q", p.DisconnectReason, p.DisconnectMessage)
	case <-ctx.Done():
		check(fmt.Errorf("the session did not end"))
		return "", ""
	}
}

func main() {
	changed := false
	for _, graceful := range []bool{false, true} {
		router, program := end(graceful)
		fmt.Printf("graceful restart %-5v  the router is told %s, the program %s\n", graceful, router, program)
		changed = changed || router != "NOTIFICATION 6/1" || program != map[bool]string{
			false: `DISCONNECT_REASON_READ_FAILED "read-failed"`,
			true:  `DISCONNECT_REASON_GRACEFUL_RESTART "graceful-restart"`,
		}[graceful]
	}
	if changed {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as described")
}
EOF
go mod init finding >/dev/null 2>&1
go get github.com/osrg/gobgp/v4@v4.8.0 >log 2>&1 || { cat log; exit 1; }
go build -o finding .
go list -m github.com/osrg/gobgp/v4
./finding
