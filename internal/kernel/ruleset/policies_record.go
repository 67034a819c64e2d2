package ruleset

import (
	"strings"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// RecordGroup is the NFLOG group that packets are recorded to. Without a reader the kernel forgets them at once.
const RecordGroup = 64112

// RecordBytes are what a record has of a packet: headers, with some of an IPv6 packet's extensions.
const RecordBytes = 96

// Kind says why a packet is recorded.
type Kind string

// The kinds.
const (
	Denied   Kind = "denied"   // no policy allows it, or a rule of a tier denies it: dropped
	Closed   Kind = "closed"   // the policies of its pod are not known yet: dropped
	Ended    Kind = "ended"    // of a connection that policies do not allow any more: dropped or reset
	Audited  Kind = "audited"  // policies that are audited would drop it
	Accepted Kind = "accepted" // allowed by policies that isolate its pod, or are about it
)

// Record is what the kernel says of a packet beside its headers. One of Ended has no direction.
type Record struct {
	Kind
	policy.Direction
}

const recordPrefix = "fathom-policy "

// String is the record as packets carry it, "fathom-policy denied egress".
func (r Record) String() string {
	if r.Kind == Ended {
		return recordPrefix + string(r.Kind)
	}
	return recordPrefix + string(r.Kind) + " " + r.Direction.String()
}

// ParseRecord is the reverse of String.
func ParseRecord(s string) (r Record, ok bool) {
	for _, k := range []Kind{Denied, Closed, Ended, Audited, Accepted} {
		for _, d := range policy.Directions {
			if r = (Record{k, d}); r.String() == s {
				return r, true
			}
		}
	}
	return Record{}, false
}

// chain is the chain that packets go to which are recorded so.
func (r Record) chain() string {
	return strings.ReplaceAll(strings.TrimPrefix(r.String(), recordPrefix), " ", "_")
}

// recorded are sources of which something was recorded, with a limit for each.
const recorded = "recorded"

// A source that sends what is dropped as fast as it can must not keep others from being told of, nor cost much: each has a limit of its own,
// and there is one of all together. What is allowed is sampled by one limit alone.
var (
	recordsOfSource = expr.Limit{Type: expr.LimitTypePkts, Rate: 10, Unit: expr.LimitTimeSecond, Burst: 20}
	recordsOfAll    = expr.Limit{Type: expr.LimitTypePkts, Rate: 500, Unit: expr.LimitTimeSecond, Burst: 500}
	recordsAccepted = expr.Limit{Type: expr.LimitTypePkts, Rate: 20, Unit: expr.LimitTimeSecond, Burst: 20}
)

const (
	// recordedSources is how many sources have limits at a time; where there are more, nothing is recorded of those.
	recordedSources = 8192
	recordedFor     = 10 * time.Second
)

func recordSets() (all []*nft.Set) {
	for _, f := range inet.Families {
		all = append(all, &nft.Set{Name: named(recorded, f), Comment: "sources of packets that were recorded, and how many more may be", Key: addrType(f), Timeout: true, Size: recordedSources})
	}
	return all
}

// recordChains are the chains of packets that are recorded. Those of drops end there.
func recordChains(silent bool) (all []nft.Chain) {
	for _, d := range []policy.Direction{policy.Egress, policy.Ingress} {
		for _, k := range []Kind{Denied, Closed, Audited, Accepted} {
			c := nft.Chain{Name: Record{k, d}.chain()}
			addRecord(&c, Record{k, d}, silent)
			switch k {
			case Denied:
				c.Add("no policy of the pod allows it, or a rule denies it", dropped())
			case Closed:
				c.Add("nothing is allowed until policies are known", dropped())
			}
			all = append(all, c)
		}
	}
	return all
}

func addRecord(c *nft.Chain, r Record, silent bool) {
	if silent {
		return
	}
	log := []expr.Any{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_SNAPLEN,
		Group: RecordGroup, Snaplen: RecordBytes, Data: []byte(r.String())}}
	limit := func(l expr.Limit) []expr.Any { return []expr.Any{&l} }
	if r.Kind == Accepted {
		c.Add("some are recorded", limit(recordsAccepted), log)
		return
	}
	for _, f := range inet.Families {
		own := recordsOfSource
		c.Add("it is recorded, unless its source or all have sent too many", isFamily(f), []expr.Any{sourceOf(f),
			&expr.Dynset{SrcRegKey: reg(0), SetName: named(recorded, f), Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: recordedFor, Exprs: []expr.Any{&own}}},
			limit(recordsOfAll), log)
	}
}
