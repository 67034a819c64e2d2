package ruleset

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// message is an element as a transaction has it, without the header of its attribute.
func elementMessage(e element) []byte {
	t := &transaction{}
	t.element(e, true)
	return t.buf[unix.SizeofNlAttr:]
}

var elementSeeds = []element{
	{key: "\x0a\x60\x00\x0a"},
	{key: "\x0a\x60\x00\x0a", keyEnd: "\x0a\x60\x00\xff", comment: "default/web"},
	{key: "\x0a\x60\x00\x0a", end: true},
	{key: "\x0a\x60\x00\x0a\x00\x50\x00\x00", value: "\x0a\xf4\x01\x07"},
	{key: "\x0a\x60\x00\x0a", verdict: true, code: expr.VerdictGoto, value: "service-1"},
	{key: "\x0a\x60\x00\x0a", verdict: true, code: expr.VerdictDrop},
}

// What a transaction says of an element is read as that element.
func TestElementOf(t *testing.T) {
	for _, want := range elementSeeds {
		whole := elementMessage(want)
		if got := elementOf(whole); got != want {
			t.Errorf("%+v is read as %+v", want, got)
		}
		for size := range whole { // nothing is read that is not there
			elementOf(whole[:size:size])
		}
	}
}

// User data that says it is longer than it is, which anyone may write who may write nftables, ends no agent: the table
// is made anew.
func TestUserDataThatLies(t *testing.T) {
	_, path := linktest.NamespaceAt(t)
	r, err := Open(path)
	testenv.Must(t, err)
	t.Cleanup(r.Close)
	want := podnet.Masquerade{Sources: []netip.Prefix{netip.MustParsePrefix("10.100.0.0/24")}, Nodes: []netip.Addr{netip.MustParseAddr("10.0.0.2")}}
	_, err = r.SetMasquerade(want)
	testenv.Must(t, err)
	lie := newTransaction(MasqueradeTable)
	at := lie.message(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, "lie")
	lie.text(unix.NFTA_SET_ELEM_LIST_TABLE, MasqueradeTable)
	lie.text(unix.NFTA_SET_ELEM_LIST_SET, "node_addrs4")
	all := lie.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	one := lie.nest(unix.NFTA_LIST_ELEM)
	key := lie.nest(unix.NFTA_SET_ELEM_KEY)
	lie.bytes(unix.NFTA_DATA_VALUE, []byte{10, 0, 0, 3})
	lie.unnest(key)
	lie.bytes(unix.NFTA_SET_ELEM_USERDATA, []byte{byte(userdata.NFTNL_UDATA_SET_ELEM_COMMENT), 200, 'x'})
	lie.unnest(one)
	lie.unnest(all)
	lie.close(at)
	testenv.Must(t, r.socket.commit(lie))
	for _, changes := range []diff.Count{{Added: 1}, {}} {
		if got, err := r.SetMasquerade(want); err != nil || got != changes {
			t.Errorf("changed %+v, %v; want %+v", got, err, changes)
		}
	}
}

func FuzzElement(f *testing.F) {
	for _, e := range elementSeeds {
		f.Add(elementMessage(e))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e := elementOf(b)
		size := len(e.key) + len(e.keyEnd) + len(e.value) + len(e.comment)
		if size > len(b) {
			t.Fatalf("%d bytes are read out of %d: %+v", size, len(b), e)
		}
		// One that fits into a message again is the same when it is read again.
		if size < 200 && e.key != "" && !strings.ContainsRune(e.comment, 0) && (!e.verdict || !strings.ContainsRune(e.value, 0)) {
			if again := elementOf(elementMessage(e)); again != e {
				t.Errorf("%+v is read again as %+v", e, again)
			}
		}
	})
}

// A datagram is messages to its end, or an error; none reaches beyond it.
func FuzzMessages(f *testing.F) {
	t := newTransaction("services")
	t.addTable()
	f.Add(bytes.Clone(t.buf))
	f.Add(binary.NativeEndian.AppendUint32(nil, 1<<31))
	f.Fuzz(func(t *testing.T, b []byte) {
		read := 0
		_, err := eachMessage(b, func(_ uint16, _ uint32, payload []byte) bool {
			read += unix.NLMSG_HDRLEN + len(payload)
			eachAttribute(payload, func(_ uint16, data []byte) {
				if len(data) > len(payload) {
					t.Fatalf("an attribute of %d bytes in %d", len(data), len(payload))
				}
			})
			return true
		})
		if read > len(b) {
			t.Errorf("%d of %d bytes were read: %v", read, len(b), err)
		}
	})
}
