package policies

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/nflog"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Packets are packets that the kernel's rules log: nflog.Reader.
type Packets interface {
	Run(ctx context.Context, each func(nflog.Packet), lost func(int)) error
	Close()
}

func openPackets() (Packets, error) {
	return nflog.Open(link.OwnNetNS, ruleset.RecordGroup, ruleset.RecordBytes)
}

const (
	// recordsKept is how many different connections are remembered; of more, those that were seen last.
	recordsKept = 2048
	// In a minute there is one event for each connection, and no more than so many for a pod, and for all: of a flood there is more in what
	// fathom drops says.
	eventsEach     = time.Minute
	eventsOfPod    = 10
	eventsOfMinute = 100
)

// records is what is remembered of packets.
type records struct {
	mu      sync.Mutex
	all     map[recordKey]*record
	last    uint64
	lost    uint64
	problem string

	minute time.Time // that the counts of events are of
	events int
	ofPods map[service.Name]int
}

type recordKey struct {
	verdict   string
	direction policy.Direction
	from, to  netip.Addr
	protocol  uint8
	port      uint16
}

type record struct {
	answer.PolicyRecord
	told time.Time // by an event
}

// recorded is a packet with what is known of it.
type recorded struct {
	key        recordKey
	sourcePort uint16
	from, to   answer.End
	pod        service.Name // whose policies decided, if it is known
	uid        string
	policies   []policy.ID
	by         policy.Reason
	why        string
	quiet      bool // it is no event
}

// runRecords reads what the kernel logs until the context ends.
func (k *Keeper) runRecords(ctx context.Context) {
	wait := time.NewTicker(retry)
	defer wait.Stop()
	for {
		packets, err := k.packets()
		if err == nil {
			k.records.fail(nil)
			err = packets.Run(ctx, k.record, func(n int) { k.lost(n) })
			packets.Close()
		}
		if ctx.Err() != nil {
			return
		}
		if k.records.fail(err) { // another agent that is about to end, or a kernel that has no such thing
			k.Log.Warn("policies: what they drop is not recorded", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
	}
}

// fail keeps why nothing is read, and says whether that is news.
func (r *records) fail(err error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.problem
	r.problem = ""
	if err != nil {
		r.problem = answer.OneLine(err)
	}
	return r.problem != was
}

func (k *Keeper) lost(n int) {
	k.metrics.lost.Add(float64(n))
	k.records.mu.Lock()
	k.records.lost += uint64(n)
	k.records.mu.Unlock()
}

// record keeps a packet that the kernel has logged.
func (k *Keeper) record(p nflog.Packet) {
	is, ok := ruleset.ParseRecord(p.Prefix)
	if !ok {
		return
	}
	now := time.Now()
	k.lookAtNode(now)
	r, ok := k.account(is, p)
	if !ok {
		return
	}
	kept, news := k.records.keep(r, now)
	if !news {
		return
	}
	k.metrics.record(r)
	if k.records.tells(kept, r, now) && k.Events != nil {
		k.Events.Record(eventOf(r))
	}
}

// lookAtNode looks up from time to time which addresses are the node's.
func (k *Keeper) lookAtNode(now time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if now.Sub(k.nodeLooked) < nodeLook {
		return
	}
	if own, err := nodeAddrs(); err == nil {
		k.nodeAddrs, k.nodeLooked = own, now
	}
}

// nodeLook is how old what is known of the node's addresses may be.
const nodeLook = 10 * time.Second

// account says who sent a packet to whom, and what decided about it. It is not ok if that is nothing of interest: policies that were changed
// meanwhile do not decide about it any more.
func (k *Keeper) account(is ruleset.Record, p nflog.Packet) (r recorded, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	packet := policy.Packet{From: p.From, To: p.To, Protocol: service.Protocol(p.Protocol), Port: p.Port}
	r = recorded{key: recordKey{answer.Dropped, is.Direction, p.From, p.To, p.Protocol, p.Port}, sourcePort: p.SourcePort}
	var v policy.Verdict
	judge := func() {
		if v = k.facts.Judge(r.key.direction, packet); r.key.direction == policy.Egress && k.nodeAddrs[packet.To] {
			v = k.facts.JudgeToNode(packet)
		}
	}
	if is.Kind == ruleset.Ended { // it may be a reply, and either end's
		for _, way := range []policy.Packet{packet, {From: p.To, To: p.From, Protocol: packet.Protocol, Port: p.SourcePort}} {
			for _, d := range []policy.Direction{policy.Egress, policy.Ingress} {
				if packet, r.key.direction = way, d; !ok {
					judge()
					if ok = !v.Allowed; ok {
						r.key.from, r.key.to, r.key.port = way.From, way.To, way.Port
						break
					}
				}
			}
			if ok {
				break
			}
		}
		if !ok {
			return r, false
		}
		r.sourcePort = p.SourcePort + p.Port - r.key.port
	} else {
		judge()
	}
	r.policies, r.by = v.Policies, v.By
	switch is.Kind {
	case ruleset.Closed:
		r.policies, r.by, r.quiet = nil, policy.Reason{}, true
		r.why = "the policies of its pod are not known yet"
	case ruleset.Denied, ruleset.Ended:
		r.why = because(v)
		if is.Kind == ruleset.Ended {
			r.why = "of a connection that was there before: " + r.why
		}
	case ruleset.Audited:
		if len(v.Audit) == 0 {
			return r, false
		}
		r.key.verdict, r.policies, r.why = answer.Audited, v.Audit, "no rule of "+names(v.Audit)+" allows it"
	case ruleset.Accepted:
		if !v.Isolated || !v.Allowed {
			return r, false
		}
		r.key.verdict, r.why, r.quiet = answer.Accepted, because(v), true
	}
	r.from, r.to = k.end(r.key.from), k.end(r.key.to)
	subject := r.key.to
	if r.key.direction == policy.Egress {
		subject = r.key.from
	}
	if name, found := k.model.PodAt(subject); found {
		r.pod, r.uid = name, k.own[name].uid
	}
	return r, true
}

// because says why a packet is allowed or not.
func because(v policy.Verdict) string {
	switch {
	case v.By.Kind != "" && v.Allowed:
		return v.By.Kind + " " + v.By.String() + " allows it"
	case v.By.Kind != "":
		return v.By.Kind + " " + v.By.String() + " denies it"
	case v.Allowed:
		return "policies that have changed since"
	}
	return "no rule of " + names(v.Policies) + " allows it"
}

func names(list []policy.ID) string {
	var all []string
	for _, id := range list {
		all = append(all, id.String())
	}
	return strings.Join(all, ", ")
}

func (k *Keeper) end(a netip.Addr) answer.End {
	e := answer.End{Addr: a}
	if name, found := k.model.PodAt(a); found {
		e.Pod = name.String()
	} else if k.nodeAddrs[a] {
		e.Node = k.Node
	}
	return e
}

// keep counts a packet in its record. It is no news if it was counted already: a packet that one tier passes to the next is logged as allowed
// by both.
func (r *records) keep(is recorded, now time.Time) (kept *record, news bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	kept = r.all[is.key]
	if kept == nil {
		if len(r.all) >= recordsKept {
			r.forget()
		}
		kept = &record{PolicyRecord: answer.PolicyRecord{First: now, Verdict: is.key.verdict, Direction: is.key.direction.String(), Protocol: protocolName(is.key.protocol), Port: is.key.port}}
		r.all[is.key] = kept
	} else if is.key.verdict == answer.Accepted && kept.SourcePort == is.sourcePort && kept.Number == r.last {
		return kept, false
	}
	r.last++
	kept.Number, kept.Last, kept.SourcePort = r.last, now, is.sourcePort
	kept.Count++
	kept.From, kept.To, kept.Why, kept.Rule, kept.Policies = is.from, is.to, is.why, "", nil
	for _, id := range is.policies {
		kept.Policies = append(kept.Policies, id.String())
	}
	if is.by.Kind != "" {
		kept.Rule = is.by.Kind + " " + is.by.String()
	}
	return kept, true
}

// forget makes room: the eighth that was seen longest ago goes.
func (r *records) forget() {
	var numbers []uint64
	for _, x := range r.all {
		numbers = append(numbers, x.Number)
	}
	slices.Sort(numbers)
	until := numbers[len(numbers)/8]
	for key, x := range r.all {
		if x.Number <= until {
			delete(r.all, key)
		}
	}
}

// tells says whether there is to be an event of a record now, and counts it.
func (r *records) tells(kept *record, is recorded, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.minute) >= time.Minute {
		r.minute, r.events, r.ofPods = now, 0, map[service.Name]int{}
	}
	if is.quiet || is.uid == "" || now.Sub(kept.told) < eventsEach || r.events >= eventsOfMinute || r.ofPods[is.pod] >= eventsOfPod {
		return false
	}
	kept.told = now
	r.events++
	r.ofPods[is.pod]++
	return true
}

// eventOf is the same for the same connection, so that it is counted: it has no number of packets, and no source port.
func eventOf(r recorded) kube.Event {
	reason, verb := "PolicyDropped", "is dropped"
	if r.key.verdict == answer.Audited {
		reason, verb = "PolicyAudit", "would be dropped"
	}
	peer := "to " + r.to.String()
	if r.key.direction == policy.Ingress {
		peer = "from " + r.from.String()
	}
	return kube.Event{
		Object:  corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: r.pod.Namespace, Name: r.pod.Name, UID: types.UID(r.uid)},
		Warning: r.key.verdict == answer.Dropped, Reason: reason,
		Message: fmt.Sprintf("%s %s, %s, %s: %s", r.key.direction, peer, portName(r.key), verb, r.why),
	}
}

func portName(k recordKey) string {
	if k.port == 0 {
		return protocolName(k.protocol)
	}
	return fmt.Sprintf("port %d/%s", k.port, protocolName(k.protocol))
}

func protocolName(p uint8) string {
	switch service.Protocol(p) {
	case service.TCP, service.UDP, service.SCTP:
		return service.Protocol(p).String()
	case 1:
		return "ICMP"
	case 58:
		return "ICMPv6"
	}
	return "protocol " + strconv.Itoa(int(p))
}

// Records returns what was recorded after the packet of a number; 0 is all that is remembered.
func (k *Keeper) Records(after uint64) answer.PolicyRecords {
	r := &k.records
	r.mu.Lock()
	defer r.mu.Unlock()
	s := answer.PolicyRecords{Last: r.last, Lost: r.lost, Problem: r.problem, Records: []answer.PolicyRecord{}}
	for _, x := range r.all {
		if x.Number > after || after > r.last { // the latter is of another agent
			s.Records = append(s.Records, x.PolicyRecord)
		}
	}
	slices.SortFunc(s.Records, func(a, b answer.PolicyRecord) int {
		if a.Number < b.Number {
			return -1
		}
		return 1
	})
	return s
}
