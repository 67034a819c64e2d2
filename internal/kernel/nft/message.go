package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
)

// A table may have hundreds of thousands of elements. The library makes a dozen allocations for each and asks the kernel to
// acknowledge every message, which overruns a socket of normal size. So messages are built here, in one buffer, and
// only the last is acknowledged; errors come without being asked for.

// messages are a transaction, or one request, as the kernel reads it.
type messages struct {
	table   string
	buf     []byte
	last    int      // where in it the last message begins
	objects []string // what each message is about, for errors; the index is the message's sequence number
}

// encode returns the messages of a transaction.
func encode(x Transaction) (*messages, error) {
	t := &messages{table: x.Table}
	t.close(t.frame(unix.NFNL_MSG_BATCH_BEGIN, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, 0, "begin the transaction"))
	if x.Delete {
		// Added so that the deletion after it does not fail.
		t.tableMessage(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "make the table")
		t.tableMessage(unix.NFT_MSG_DELTABLE, 0, "delete the table")
	}
	chains := x.Chains
	if x.Make != nil {
		t.tableMessage(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "make the table")
		for i, s := range x.Make.Sets {
			t.addSet(s, i+1)
		}
		chains = slices.Concat(x.Make.Chains, chains)
	}
	for _, c := range chains { // all of them before the rules, which may jump to any
		t.addChain(c)
	}
	for _, c := range x.Filled {
		at := t.message(unix.NFT_MSG_DELRULE, 0, "empty the chain "+c.Name)
		t.text(unix.NFTA_RULE_TABLE, t.table)
		t.text(unix.NFTA_RULE_CHAIN, c.Name)
		t.close(at)
	}
	for _, c := range slices.Concat(chains, x.Filled) {
		if err := t.addRules(c); err != nil {
			return nil, err
		}
	}
	for _, e := range x.Remove { // fails if one is not there
		t.elements(unix.NFT_MSG_DELSETELEM, 0, "delete from the set "+e.Set.Name, e)
	}
	for _, e := range x.Add { // fails if one is there already: then the kernel holds what we do not think it does
		t.elements(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "add to the set "+e.Set.Name, e)
	}
	for _, name := range x.Gone {
		at := t.message(unix.NFT_MSG_DELCHAIN, 0, "delete the chain "+name)
		t.text(unix.NFTA_CHAIN_TABLE, t.table)
		t.text(unix.NFTA_CHAIN_NAME, name)
		t.close(at)
	}
	return t, nil
}

// frame begins a message, and returns where.
func (t *messages) frame(kind uint16, family byte, resource uint16, flags uint16, about string) int {
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

func (t *messages) message(kind uint16, flags uint16, about string) int {
	return t.frame(unix.NFNL_SUBSYS_NFTABLES<<8|kind, unix.NFPROTO_INET, 0, flags, about)
}

func (t *messages) close(at int) { binary.NativeEndian.PutUint32(t.buf[at:], uint32(len(t.buf)-at)) }

func (t *messages) bytes(kind uint16, data []byte) {
	t.buf = binary.NativeEndian.AppendUint16(t.buf, uint16(unix.SizeofNlAttr+len(data)))
	t.buf = binary.NativeEndian.AppendUint16(t.buf, kind)
	t.buf = append(t.buf, data...)
	for len(t.buf)%4 != 0 {
		t.buf = append(t.buf, 0)
	}
}

func (t *messages) text(kind uint16, s string) { t.bytes(kind, append([]byte(s), 0)) }

func (t *messages) number(kind uint16, n uint32) {
	t.bytes(kind, binary.BigEndian.AppendUint32(nil, n))
}

// nest begins an attribute of attributes, which unnest ends.
func (t *messages) nest(kind uint16) int {
	at := len(t.buf)
	t.buf = binary.NativeEndian.AppendUint16(t.buf, 0)
	t.buf = binary.NativeEndian.AppendUint16(t.buf, kind|unix.NLA_F_NESTED)
	return at
}

func (t *messages) unnest(at int) {
	binary.NativeEndian.PutUint16(t.buf[at:], uint16(len(t.buf)-at))
}

func (t *messages) tableMessage(kind, flags uint16, about string) {
	at := t.message(kind, flags, about)
	t.text(unix.NFTA_TABLE_NAME, t.table)
	t.close(at)
}

// Not in x/sys.
const (
	setConcat     = 0x80 // NFT_SET_CONCAT
	setDescConcat = 2    // NFTA_SET_DESC_CONCAT
	elementKeyEnd = 10   // NFTA_SET_ELEM_KEY_END
)

func (t *messages) addSet(s *Set, id int) {
	at := t.message(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "add the set "+s.Name)
	t.text(unix.NFTA_SET_TABLE, t.table)
	t.text(unix.NFTA_SET_NAME, s.Name)
	t.number(unix.NFTA_SET_FLAGS, s.flags())
	t.number(unix.NFTA_SET_KEY_TYPE, s.Key.GetNFTMagic())
	t.number(unix.NFTA_SET_KEY_LEN, s.Key.Bytes)
	t.number(unix.NFTA_SET_ID, uint32(id))
	if s.isMap() {
		kind, size := s.dataType()
		t.number(unix.NFTA_SET_DATA_TYPE, kind)
		t.number(unix.NFTA_SET_DATA_LEN, size)
	}
	desc := t.nest(unix.NFTA_SET_DESC)
	if s.Size != 0 {
		t.number(unix.NFTA_SET_DESC_SIZE, s.Size)
	}
	if s.flags()&setConcat != 0 {
		concat := t.nest(setDescConcat)
		for _, field := range nftables.ConcatSetTypeElements(s.Key) {
			one := t.nest(unix.NFTA_LIST_ELEM)
			t.number(1, field.Bytes) // NFTA_SET_FIELD_LEN
			t.unnest(one)
		}
		t.unnest(concat)
	}
	t.unnest(desc)
	var data []byte
	const hostOrder = 1 // so that nft prints numbers as they are
	isHost := func(name string) bool { return name == nftables.TypeMark.Name || name == nftables.TypeClassID.Name }
	if isHost(s.Key.Name) {
		data = userdata.AppendUint32(data, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, hostOrder)
	}
	if isHost(s.Data.Name) {
		data = userdata.AppendUint32(data, userdata.NFTNL_UDATA_SET_DATABYTEORDER, hostOrder)
	}
	t.bytes(unix.NFTA_SET_USERDATA, userdata.AppendString(data, userdata.NFTNL_UDATA_SET_COMMENT, s.Comment))
	t.close(at)
}

func (t *messages) addChain(c Chain) {
	at := t.message(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "add the chain "+c.Name)
	t.text(unix.NFTA_CHAIN_TABLE, t.table)
	t.text(unix.NFTA_CHAIN_NAME, c.Name)
	if c.Hook != nil {
		hook := t.nest(unix.NFTA_CHAIN_HOOK)
		t.number(unix.NFTA_HOOK_HOOKNUM, uint32(*c.Hook))
		t.number(unix.NFTA_HOOK_PRIORITY, uint32(*c.Priority))
		t.unnest(hook)
		t.text(unix.NFTA_CHAIN_TYPE, string(c.Kind))
	}
	t.close(at)
}

func (t *messages) addRules(c Chain) error {
	for _, r := range c.Rules {
		at := t.message(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, "add to the chain "+c.Name+" the rule that "+r.Comment)
		t.text(unix.NFTA_RULE_TABLE, t.table)
		t.text(unix.NFTA_RULE_CHAIN, c.Name)
		list := t.nest(unix.NFTA_RULE_EXPRESSIONS)
		for _, e := range r.Exprs {
			data, err := expr.Marshal(unix.NFPROTO_INET, e)
			if err != nil {
				return fmt.Errorf("chain %s, rule %q: %w", c.Name, r.Comment, err)
			}
			t.bytes(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, data)
		}
		t.unnest(list)
		t.bytes(unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, r.Comment))
		t.close(at)
	}
	return nil
}

func (t *messages) elements(kind, flags uint16, about string, e Elements) {
	const room = 60 << 10 // of an attribute, whose length has 16 bits
	paired, whole := e.Set.isPaired(), kind == unix.NFT_MSG_NEWSETELEM
	for list := e.List; len(list) > 0; {
		at := t.message(kind, flags, about)
		t.text(unix.NFTA_SET_ELEM_LIST_TABLE, t.table)
		t.text(unix.NFTA_SET_ELEM_LIST_SET, e.Set.Name)
		all := t.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		for len(list) > 0 && len(t.buf)-all < room {
			one := bound{Element: list[0]}
			list = list[1:]
			if !paired {
				t.element(one, whole)
				continue
			}
			end := one.KeyEnd
			one.KeyEnd = ""
			t.element(one, whole)
			if key, found := behind(end); found { // what reaches to the last of all has no end
				t.element(bound{Element{Key: key}, true}, whole)
			}
		}
		t.unnest(all)
		t.close(at)
	}
}

func (t *messages) element(e bound, whole bool) {
	value := func(kind uint16, data string) {
		at := t.nest(kind)
		t.bytes(unix.NFTA_DATA_VALUE, []byte(data))
		t.unnest(at)
	}
	at := t.nest(unix.NFTA_LIST_ELEM)
	if e.end {
		t.number(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
	}
	value(unix.NFTA_SET_ELEM_KEY, e.Key)
	if e.KeyEnd != "" {
		value(elementKeyEnd, e.KeyEnd)
	}
	if !whole {
		t.unnest(at)
		return
	}
	switch {
	case e.Verdict:
		data := t.nest(unix.NFTA_SET_ELEM_DATA)
		verdict := t.nest(unix.NFTA_DATA_VERDICT)
		t.number(unix.NFTA_VERDICT_CODE, uint32(e.Code))
		if e.Value != "" {
			t.text(unix.NFTA_VERDICT_CHAIN, e.Value)
		}
		t.unnest(verdict)
		t.unnest(data)
	case e.Value != "":
		value(unix.NFTA_SET_ELEM_DATA, e.Value)
	}
	if e.Comment != "" {
		t.bytes(unix.NFTA_SET_ELEM_USERDATA, userdata.AppendString(nil, userdata.NFTNL_UDATA_SET_ELEM_COMMENT, e.Comment))
	}
	t.unnest(at)
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

func elementOf(b []byte) bound {
	var e bound
	nlmsg.Attrs(b, func(kind uint16, data []byte) {
		switch kind {
		case unix.NFTA_SET_ELEM_KEY:
			nlmsg.Attrs(data, func(_ uint16, v []byte) { e.Key = string(v) })
		case elementKeyEnd:
			nlmsg.Attrs(data, func(_ uint16, v []byte) { e.KeyEnd = string(v) })
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end = len(data) == 4 && binary.BigEndian.Uint32(data)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_USERDATA:
			e.Comment = commentOf(data, userdata.NFTNL_UDATA_SET_ELEM_COMMENT)
		case unix.NFTA_SET_ELEM_DATA:
			nlmsg.Attrs(data, func(kind uint16, v []byte) {
				if kind == unix.NFTA_DATA_VALUE {
					e.Value = string(v)
					return
				}
				nlmsg.Attrs(v, func(kind uint16, v []byte) {
					switch {
					case kind == unix.NFTA_VERDICT_CODE && len(v) == 4:
						e.Verdict, e.Code = true, expr.VerdictKind(int32(binary.BigEndian.Uint32(v)))
					case kind == unix.NFTA_VERDICT_CHAIN && len(v) > 0:
						e.Value = string(v[:len(v)-1])
					}
				})
			})
		}
	})
	return e
}
