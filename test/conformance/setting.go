package main

import (
	"strings"
)

// A setting is what makes one run differ from another: a section of the scoreboard.
type setting struct {
	Network string // bridge, flannel, none, …
	Proxy   string // fathom, kube-proxy, none, …
	Mode    string // of kube-proxy: nftables, iptables or ipvs; of fathom: auto or nftables
	Family  string // ipv4, ipv6 or dual
}

func (s setting) withDefaults() setting {
	def := func(value *string, otherwise string) {
		if *value == "" {
			*value = otherwise
		}
	}
	def(&s.Network, "fathom")
	if s.Network == "fathom" && s.Mode != "iptables" && s.Mode != "ipvs" { // as `fathom up` has it
		def(&s.Proxy, "fathom")
	}
	def(&s.Proxy, "kube-proxy")
	def(&s.Family, "ipv4")
	switch s.Proxy {
	case "fathom":
		def(&s.Mode, "auto")
	case "kube-proxy":
		def(&s.Mode, "nftables")
	default:
		s.Mode = ""
	}
	return s
}

// String is the heading of the setting's section.
func (s setting) String() string {
	proxy := s.Proxy
	switch {
	case proxy == "none":
		proxy = "no proxy"
	case s.Mode != "":
		proxy += " " + s.Mode
	}
	network := s.Network
	if network == "none" {
		network = "no network"
	}
	return network + ", " + proxy + ", " + s.Family
}

func (s setting) dirName() string {
	parts := []string{s.Network, s.Proxy}
	if s.Mode != "" {
		parts = append(parts, s.Mode)
	}
	return strings.Join(append(parts, s.Family), "-")
}
