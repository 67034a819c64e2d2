package main

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"
)

// TestPackets has one client send more than a socket holds while nobody reads; a packet of another is there all the same.
func TestPackets(t *testing.T) {
	for _, a := range []string{"fd66::41", "fd66::42", "fd66::43"} {
		if out, err := exec.Command("ip", "addr", "add", a+"/128", "dev", "lo", "nodad").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for what, test := range map[string]struct{ at, flooder, other string }{
		"IPv4": {"127.0.0.3:5353", "127.0.0.66", "127.0.0.67"},
		"IPv6": {"[fd66::41]:5353", "fd66::42", "fd66::43"},
	} {
		t.Run(what, func(t *testing.T) {
			at := netip.MustParseAddrPort(test.at)
			all, err := listenPackets(t.Context(), at)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range all {
				defer c.Close()
			}
			send := func(from string, packets int) {
				// From many ports: were they what sockets are chosen by, it would fill all of them.
				for range 8 {
					c, err := net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(from)}, net.UDPAddrFromAddrPort(at))
					if err != nil {
						t.Fatal(err)
					}
					for range packets {
						if _, err := c.Write(make([]byte, 64)); err != nil {
							t.Fatal(err)
						}
					}
					_ = c.Close()
				}
			}
			send(test.flooder, 5000)
			send(test.other, 1)
			got := map[string]int{}
			for _, c := range all {
				var from net.Addr
				var err error
				for buffer := make([]byte, 512); err == nil; {
					// On loopback what was sent has come.
					_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
					if _, from, err = c.ReadFrom(buffer); err == nil {
						got[from.(*net.UDPAddr).IP.String()]++
					}
				}
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				}
			}
			if got[test.other] != 8 {
				t.Errorf("of the other client's 8 packets %d came", got[test.other])
			}
			if n := got[test.flooder]; n == 0 || n == 8*5000 {
				t.Errorf("of the flood's packets %d came: that was none", n)
			}
		})
	}
}
