package answer

import (
	"net/netip"
	"time"
)

// PolicyRecords is what an agent has recorded of what policies do to packets.
type PolicyRecords struct {
	// Last is the number of the last packet. Those who ask again, for what came after it, and are told of a smaller one, talk to another
	// agent than before.
	Last    uint64         `json:"last"`
	Records []PolicyRecord `json:"records"` // the oldest first
	// Lost is how many packets came too fast to be read, and Problem why none are, if none are.
	Lost    uint64 `json:"lost,omitempty"`
	Problem string `json:"problem,omitempty"`
}

// PolicyRecord is what policies have done, in one direction, with packets that begin a connection from one end to a port of another.
type PolicyRecord struct {
	Number     uint64    `json:"number"` // of the last of these packets
	Node       string    `json:"node,omitempty"`
	First      time.Time `json:"first"`
	Last       time.Time `json:"last"`
	Count      int       `json:"count"`
	Verdict    string    `json:"verdict"`
	Direction  string    `json:"direction"`
	From       End       `json:"from"`
	To         End       `json:"to"`
	Protocol   string    `json:"protocol"`
	SourcePort uint16    `json:"sourcePort,omitempty"` // of the last packet
	Port       uint16    `json:"port,omitempty"`
	// Policies are those that decide, and Rule is the one of their rules that does, if one does. Why says it in words.
	Policies []string `json:"policies,omitempty"`
	Rule     string   `json:"rule,omitempty"`
	Why      string   `json:"why"`
}

// The verdicts of a PolicyRecord.
const (
	Dropped  = "dropped"
	Audited  = "audited" // it would be dropped, if policies were not audited
	Accepted = "accepted"
)

// End is an end of a connection: a pod, a node, or an address that is neither's as far as is known.
type End struct {
	Pod  string     `json:"pod,omitempty"` // "shop/web"
	Node string     `json:"node,omitempty"`
	Addr netip.Addr `json:"address"`
}

// String returns "Pod shop/web (10.244.1.2)", or the address alone.
func (e End) String() string {
	switch {
	case e.Pod != "":
		return "Pod " + e.Pod + " (" + e.Addr.String() + ")"
	case e.Node != "":
		return "Node " + e.Node + " (" + e.Addr.String() + ")"
	}
	return e.Addr.String()
}
