#!/bin/sh
# With GoBGP, graceful restart does not survive a cut connection: it says that forwarding stopped.
#
# Library:  github.com/osrg/gobgp/v4 v4.8.0, pkg/server.
# Expected: the F bit (forwarding state, RFC 4724) of a family says whether packets were still forwarded. After a
#           connection was cut, with the speaker alive and its routes in the kernel, it is 1, and the router keeps
#           the routes while they are announced again.
# Instead:  GoBGP ties it to the R bit (restart state). Both are 1 in the first session of a peer that was added with
#           LocalRestarting, and 0 in each one after. A router that sees F = 0 has to drop at once what it kept.
# Known:    osrg/gobgp#2120 (2019, open).
# Means:    where nodes announce Services or pods by GoBGP, a session that is lost while both ends live costs an outage
#           until all routes have been announced again, which graceful restart was turned on to prevent. A restart of the
#           process does not. A new peer (or server) with LocalRestarting for each session avoids it.
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
	"github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"
)

func check(err error) {
	if err != nil {
		fmt.Println("not shown:", err)
		os.Exit(1)
	}
}

func read(c net.Conn) *bgp.BGPMessage {
	header := make([]byte, bgp.BGP_HEADER_LENGTH)
	_, err := io.ReadFull(c, header)
	check(err)
	message := make([]byte, binary.BigEndian.Uint16(header[16:]))
	copy(message, header)
	_, err = io.ReadFull(c, message[len(header):])
	check(err)
	parsed, err := bgp.ParseBGPMessage(message)
	check(err)
	return parsed
}

func write(c net.Conn, m *bgp.BGPMessage) {
	b, err := m.Serialize()
	check(err)
	_, err = c.Write(b)
	check(err)
}

// session is the router's side of one: it gives the bits that the OPEN had, and cuts the connection when both have said
// that all is announced.
func session(l net.Listener) (restart, forwarding bool) {
	check(l.(*net.TCPListener).SetDeadline(time.Now().Add(time.Minute)))
	c, err := l.Accept()
	check(err)
	defer c.Close()
	check(c.SetDeadline(time.Now().Add(time.Minute)))
	open, ok := read(c).Body.(*bgp.BGPOpen)
	if !ok {
		check(fmt.Errorf("no OPEN"))
	}
	for _, option := range open.OptParams {
		for _, capability := range option.(*bgp.OptionParameterCapability).Capability {
			if g, ok := capability.(*bgp.CapGracefulRestart); ok && len(g.Tuples) == 1 {
				restart, forwarding = g.Flags&0x08 != 0, g.Tuples[0].Flags&0x80 != 0
			}
		}
	}
	answer, err := bgp.NewBGPOpenMessage(65002, 90, netip.MustParseAddr("192.0.2.2"), []bgp.OptionParameterInterface{
		bgp.NewOptionParameterCapability([]bgp.ParameterCapabilityInterface{
			bgp.NewCapMultiProtocol(bgp.RF_IPv4_UC), bgp.NewCapFourOctetASNumber(65002),
			bgp.NewCapGracefulRestart(false, false, 120, []*bgp.CapGracefulRestartTuple{bgp.NewCapGracefulRestartTuple(bgp.RF_IPv4_UC, true)}),
		}),
	})
	check(err)
	write(c, answer)
	write(c, bgp.NewBGPKeepAliveMessage())
	write(c, bgp.NewEndOfRib(bgp.RF_IPv4_UC))
	for {
		if u, ok := read(c).Body.(*bgp.BGPUpdate); ok {
			if end, _ := u.IsEndOfRib(); end {
				return restart, forwarding
			}
		}
	}
}

func main() {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	check(err)
	ctx := context.Background()
	s := server.NewBgpServer(server.LoggerOption(slog.New(slog.DiscardHandler), nil))
	go s.Serve()
	check(s.StartBgp(ctx, &api.StartBgpRequest{Global: &api.Global{Asn: 65001, RouterId: "192.0.2.1", ListenPort: -1}}))
	check(s.AddPeer(ctx, &api.AddPeerRequest{Peer: &api.Peer{
		Conf:            &api.PeerConf{NeighborAddress: "127.0.0.1", PeerAsn: 65002},
		Transport:       &api.Transport{RemotePort: uint32(l.Addr().(*net.TCPAddr).Port)},
		Timers:          &api.Timers{Config: &api.TimersConfig{ConnectRetry: 1, IdleHoldTimeAfterReset: 1}},
		GracefulRestart: &api.GracefulRestart{Enabled: true, RestartTime: 120, DeferralTime: 60, LocalRestarting: true},
		AfiSafis: []*api.AfiSafi{{
			Config:            &api.AfiSafiConfig{Family: &api.Family{Afi: api.Family_AFI_IP, Safi: api.Family_SAFI_UNICAST}, Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: true}},
		}},
	}}))

	restart, first := session(l)
	fmt.Printf("first session:                    R=%v F=%v\n", restart, first)
	restart, second := session(l)
	fmt.Printf("after the connection was cut:     R=%v F=%v\n", restart, second)
	if !first || second {
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
