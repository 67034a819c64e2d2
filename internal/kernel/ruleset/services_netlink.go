package ruleset

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// The table of Services has a hundred thousand elements where others have a hundred. The library makes a dozen
// allocations for each and asks the kernel to acknowledge every message, which overruns a socket of normal size.
// So messages are built here, in one buffer, and only the last is acknowledged; errors come without being asked for.

// transaction is a list of changes that the kernel makes all at once, or not at all.
type transaction struct {
	table   string
	buf     []byte
	last    int      // where in it the last message begins
	objects []string // what each message is about, for errors; the index is the message's sequence number
}

func newTransaction(table string) *transaction {
	t := &transaction{table: table}
	t.frame(unix.NFNL_MSG_BATCH_BEGIN, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, 0, "begin the transaction")
	t.close(0)
	return t
}

// empty says that nothing is to be changed.
func (t *transaction) empty() bool { return len(t.objects) == 1 }

// frame begins a message, and returns where.
func (t *transaction) frame(kind uint16, family byte, resource uint16, flags uint16, about string) int {
	at := len(t.buf)
	t.last = at
	t.buf = binary.NativeEndian.AppendUint32(t.buf, 0)
	t.buf = binary.NativeEndian.AppendUint16(t.buf, kind)
	t.buf = binary.NativeEndian.AppendUint16(t.buf, unix.NLM_F_REQUEST|flags)
	t.buf = binary.NativeEndian.AppendUint32(t.buf, uint32(len(t.objects)))
	t.buf = binary.NativeEndian.AppendUint32(t.buf, 0)
	t.buf = append(t.buf, family, unix.NFNETLINK_V0)
	t.buf = binary.BigEndian.AppendUint16(t.buf, resource)
	t.objects = append(t.objects, about)
	return at
}

func (t *transaction) message(kind uint16, flags uint16, about string) int {
	return t.frame(unix.NFNL_SUBSYS_NFTABLES<<8|kind, unix.NFPROTO_INET, 0, flags, about)
}

func (t *transaction) close(at int) { binary.NativeEndian.PutUint32(t.buf[at:], uint32(len(t.buf)-at)) }

func (t *transaction) bytes(kind uint16, data []byte) {
	t.buf = binary.NativeEndian.AppendUint16(t.buf, uint16(unix.SizeofNlAttr+len(data)))
	t.buf = binary.NativeEndian.AppendUint16(t.buf, kind)
	t.buf = append(t.buf, data...)
	for len(t.buf)%4 != 0 {
		t.buf = append(t.buf, 0)
	}
}

func (t *transaction) text(kind uint16, s string) { t.bytes(kind, append([]byte(s), 0)) }

func (t *transaction) number(kind uint16, n uint32) {
	t.bytes(kind, binary.BigEndian.AppendUint32(nil, n))
}

// nest begins an attribute of attributes, which unnest ends.
func (t *transaction) nest(kind uint16) int {
	at := len(t.buf)
	t.buf = binary.NativeEndian.AppendUint16(t.buf, 0)
	t.buf = binary.NativeEndian.AppendUint16(t.buf, kind|unix.NLA_F_NESTED)
	return at
}

func (t *transaction) unnest(at int) {
	binary.NativeEndian.PutUint16(t.buf[at:], uint16(len(t.buf)-at))
}

// addTable makes the table, empty whatever it was.
func (t *transaction) addTable() {
	// Added so that the deletion after it does not fail.
	for _, kind := range []uint16{unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE, unix.NFT_MSG_NEWTABLE} {
		var flags uint16
		if kind == unix.NFT_MSG_NEWTABLE {
			flags = unix.NLM_F_CREATE
		}
		at := t.message(kind, flags, "make the table")
		t.text(unix.NFTA_TABLE_NAME, t.table)
		t.close(at)
	}
}

// Not in x/sys.
const (
	setConcat     = 0x80 // NFT_SET_CONCAT
	setDescConcat = 2    // NFTA_SET_DESC_CONCAT
	elementKeyEnd = 10   // NFTA_SET_ELEM_KEY_END
	dynsetDelete  = 2    // NFT_DYNSET_OP_DELETE
)

func (t *transaction) addSet(s *serviceSet, id int) {
	at := t.message(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "add the set "+s.name)
	t.text(unix.NFTA_SET_TABLE, t.table)
	t.text(unix.NFTA_SET_NAME, s.name)
	t.number(unix.NFTA_SET_FLAGS, s.flags())
	t.number(unix.NFTA_SET_KEY_TYPE, s.key.GetNFTMagic())
	t.number(unix.NFTA_SET_KEY_LEN, s.key.Bytes)
	t.number(unix.NFTA_SET_ID, uint32(id))
	if s.isMap() {
		kind, size := s.dataType()
		t.number(unix.NFTA_SET_DATA_TYPE, kind)
		t.number(unix.NFTA_SET_DATA_LEN, size)
	}
	desc := t.nest(unix.NFTA_SET_DESC)
	if s.size != 0 {
		t.number(unix.NFTA_SET_DESC_SIZE, s.size)
	}
	if s.flags()&setConcat != 0 {
		concat := t.nest(setDescConcat)
		for _, field := range nftables.ConcatSetTypeElements(s.key) {
			one := t.nest(unix.NFTA_LIST_ELEM)
			t.number(1, field.Bytes) // NFTA_SET_FIELD_LEN
			t.unnest(one)
		}
		t.unnest(concat)
	}
	t.unnest(desc)
	var data []byte
	const hostOrder = 1 // so that nft prints numbers as they are
	if s.key.Name == nftables.TypeMark.Name {
		data = userdata.AppendUint32(data, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, hostOrder)
	}
	if s.data.Name == nftables.TypeMark.Name {
		data = userdata.AppendUint32(data, userdata.NFTNL_UDATA_SET_DATABYTEORDER, hostOrder)
	}
	t.bytes(unix.NFTA_SET_USERDATA, userdata.AppendString(data, userdata.NFTNL_UDATA_SET_COMMENT, s.comment))
	t.close(at)
}

func (t *transaction) addChain(c chain) {
	at := t.message(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "add the chain "+c.name)
	t.text(unix.NFTA_CHAIN_TABLE, t.table)
	t.text(unix.NFTA_CHAIN_NAME, c.name)
	if c.hook != nil {
		hook := t.nest(unix.NFTA_CHAIN_HOOK)
		t.number(unix.NFTA_HOOK_HOOKNUM, uint32(*c.hook))
		t.number(unix.NFTA_HOOK_PRIORITY, uint32(*c.priority))
		t.unnest(hook)
		t.text(unix.NFTA_CHAIN_TYPE, string(c.kind))
	}
	t.close(at)
}

func (t *transaction) addRules(c chain) error {
	for _, r := range c.rules {
		at := t.message(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, "add to the chain "+c.name+" the rule that "+r.comment)
		t.text(unix.NFTA_RULE_TABLE, t.table)
		t.text(unix.NFTA_RULE_CHAIN, c.name)
		list := t.nest(unix.NFTA_RULE_EXPRESSIONS)
		for _, e := range r.exprs {
			data, err := expr.Marshal(unix.NFPROTO_INET, e)
			if err != nil {
				return fmt.Errorf("chain %s, rule %q: %w", c.name, r.comment, err)
			}
			t.bytes(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, data)
		}
		t.unnest(list)
		t.bytes(unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, r.comment))
		t.close(at)
	}
	return nil
}

// deleteChain takes a chain away that nothing goes to, with its rules.
func (t *transaction) deleteChain(name string) {
	at := t.message(unix.NFT_MSG_DELCHAIN, 0, "delete the chain "+name)
	t.text(unix.NFTA_CHAIN_TABLE, t.table)
	t.text(unix.NFTA_CHAIN_NAME, name)
	t.close(at)
}

// addElements fails if one is there already: then the kernel holds what we do not think it does.
func (t *transaction) addElements(set string, list []element) {
	t.elements(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "add to the set "+set, set, list)
}

// deleteElements fails if one is not there.
func (t *transaction) deleteElements(set string, list []element) {
	t.elements(unix.NFT_MSG_DELSETELEM, 0, "delete from the set "+set, set, list)
}

func (t *transaction) elements(kind, flags uint16, about, set string, list []element) {
	const room = 60 << 10 // of an attribute, whose length has 16 bits
	for len(list) > 0 {
		at := t.message(kind, flags, about)
		t.text(unix.NFTA_SET_ELEM_LIST_TABLE, t.table)
		t.text(unix.NFTA_SET_ELEM_LIST_SET, set)
		all := t.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		for len(list) > 0 && len(t.buf)-all < room {
			t.element(list[0], kind == unix.NFT_MSG_NEWSETELEM)
			list = list[1:]
		}
		t.unnest(all)
		t.close(at)
	}
}

func (t *transaction) element(e element, whole bool) {
	value := func(kind uint16, data string) {
		at := t.nest(kind)
		t.bytes(unix.NFTA_DATA_VALUE, []byte(data))
		t.unnest(at)
	}
	at := t.nest(unix.NFTA_LIST_ELEM)
	if e.end {
		t.number(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
	}
	value(unix.NFTA_SET_ELEM_KEY, e.key)
	if e.keyEnd != "" {
		value(elementKeyEnd, e.keyEnd)
	}
	if !whole {
		t.unnest(at)
		return
	}
	switch {
	case e.verdict:
		data := t.nest(unix.NFTA_SET_ELEM_DATA)
		verdict := t.nest(unix.NFTA_DATA_VERDICT)
		t.number(unix.NFTA_VERDICT_CODE, uint32(e.code))
		if e.value != "" {
			t.text(unix.NFTA_VERDICT_CHAIN, e.value)
		}
		t.unnest(verdict)
		t.unnest(data)
	case e.value != "":
		value(unix.NFTA_SET_ELEM_DATA, e.value)
	}
	if e.comment != "" {
		t.bytes(unix.NFTA_SET_ELEM_USERDATA, userdata.AppendString(nil, userdata.NFTNL_UDATA_SET_ELEM_COMMENT, e.comment))
	}
	t.unnest(at)
}

// commit makes the changes. The kernel answers while it is being told, so that every answer is there afterwards.
func (s *socket) commit(t *transaction) error {
	if t.empty() {
		return nil
	}
	last := uint32(len(t.objects)) - 1
	flags := t.buf[t.last+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
	at := t.frame(unix.NFNL_MSG_BATCH_END, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, 0, "commit the transaction")
	t.close(at)
	if err := unix.Sendto(s.fd, t.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send a transaction of %d bytes: %w", len(t.buf), err)
	}
	var failed error
	acknowledged := false
	err := s.receive(unix.MSG_DONTWAIT, func(kind uint16, sequence uint32, payload []byte) bool {
		if kind != unix.NLMSG_ERROR || len(payload) < 4 {
			return true
		}
		switch errno := unix.Errno(-int32(binary.NativeEndian.Uint32(payload))); {
		case errno == 0:
			acknowledged = acknowledged || sequence == last
		case failed == nil:
			about := "the transaction"
			if int(sequence) < len(t.objects) {
				about = t.objects[sequence]
			}
			failed = fmt.Errorf("%s: %w", about, errno)
		}
		return true
	})
	switch {
	case failed != nil:
		return failed
	case err != nil && !errors.Is(err, unix.EAGAIN):
		return err
	case !acknowledged:
		return errors.New("the kernel did not acknowledge the transaction")
	}
	return nil
}

// receive takes messages until f has seen enough, or an error such as EAGAIN.
func (s *socket) receive(flags int, f func(kind uint16, sequence uint32, payload []byte) bool) error {
	answer := make([]byte, 64<<10)
	for {
		size, _, err := unix.Recvfrom(s.fd, answer, flags)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if more, err := eachMessage(answer[:size], f); err != nil || !more {
			return err
		}
	}
}

// eachMessage hands over the messages of a datagram until f has seen enough.
func eachMessage(b []byte, f func(kind uint16, sequence uint32, payload []byte) bool) (more bool, err error) {
	for len(b) >= unix.NLMSG_HDRLEN {
		length := int(binary.NativeEndian.Uint32(b))
		if length < unix.NLMSG_HDRLEN || length > len(b) {
			return false, errors.New("the kernel's answer is cut off")
		}
		if !f(binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:]), b[unix.NLMSG_HDRLEN:length]) {
			return false, nil
		}
		b = b[min(len(b), (length+3)&^3):]
	}
	return true, nil
}

// dump asks for all objects of a kind that the attributes say, and hands over the attributes of each.
func (s *socket) dump(kind uint16, attributes func(*transaction), f func(attributes []byte)) error {
	request := &transaction{}
	at := request.message(kind, unix.NLM_F_DUMP, "")
	attributes(request)
	request.close(at)
	if err := unix.Sendto(s.fd, request.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	var failed error
	err := s.receive(0, func(kind uint16, _ uint32, payload []byte) bool {
		switch {
		case kind == unix.NLMSG_DONE:
			return false
		case kind == unix.NLMSG_ERROR && len(payload) >= 4:
			failed = unix.Errno(-int32(binary.NativeEndian.Uint32(payload)))
			return false
		case len(payload) >= nfgenmsg:
			f(payload[nfgenmsg:])
		}
		return true
	})
	return errors.Join(failed, err)
}

// eachAttribute hands over every attribute, without the flags of its kind.
func eachAttribute(b []byte, f func(kind uint16, data []byte)) {
	for len(b) >= unix.SizeofNlAttr {
		length := int(binary.NativeEndian.Uint16(b))
		if length < unix.SizeofNlAttr || length > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:length])
		b = b[min(len(b), (length+3)&^3):]
	}
}

// commentOf reads a comment out of the user data of an element or a rule; empty if there is none. Whoever may write nftables
// may write any bytes there, and userdata.GetString reads beyond the end of those that say they are longer than they are.
func commentOf(data []byte, kind userdata.Type) string {
	for len(data) >= 2 && len(data)-2 >= int(data[1]) {
		value := data[2 : 2+int(data[1])]
		if userdata.Type(data[0]) == kind {
			return string(bytes.TrimSuffix(value, []byte{0}))
		}
		data = data[2+len(value):]
	}
	return ""
}

func elementOf(b []byte) element {
	var e element
	eachAttribute(b, func(kind uint16, data []byte) {
		switch kind {
		case unix.NFTA_SET_ELEM_KEY:
			eachAttribute(data, func(_ uint16, v []byte) { e.key = string(v) })
		case elementKeyEnd:
			eachAttribute(data, func(_ uint16, v []byte) { e.keyEnd = string(v) })
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end = len(data) == 4 && binary.BigEndian.Uint32(data)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_USERDATA:
			e.comment = commentOf(data, userdata.NFTNL_UDATA_SET_ELEM_COMMENT)
		case unix.NFTA_SET_ELEM_DATA:
			eachAttribute(data, func(kind uint16, v []byte) {
				if kind == unix.NFTA_DATA_VALUE {
					e.value = string(v)
					return
				}
				eachAttribute(v, func(kind uint16, v []byte) {
					switch {
					case kind == unix.NFTA_VERDICT_CODE && len(v) == 4:
						e.verdict, e.code = true, expr.VerdictKind(int32(binary.BigEndian.Uint32(v)))
					case kind == unix.NFTA_VERDICT_CHAIN && len(v) > 0:
						e.value = string(v[:len(v)-1])
					}
				})
			})
		}
	})
	return e
}
