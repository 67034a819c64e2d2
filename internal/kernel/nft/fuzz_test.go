package nft

import (
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// elementMessage is an element as a transaction has it, without the header of its attribute.
func elementMessage(e bound) []byte {
	t := &messages{}
	t.element(e, true)
	return t.buf[unix.SizeofNlAttr:]
}

var elementSeeds = []bound{
	{Element: Element{Key: "\x0a\x60\x00\x0a"}},
	{Element: Element{Key: "\x0a\x60\x00\x0a", KeyEnd: "\x0a\x60\x00\xff", Comment: "default/web"}},
	{Element: Element{Key: "\x0a\x60\x00\x0a"}, end: true},
	{Element: Element{Key: "\x0a\x60\x00\x0a\x00\x50\x00\x00", Value: "\x0a\xf4\x01\x07"}},
	{Element: Element{Key: "\x0a\x60\x00\x0a", Verdict: true, Code: expr.VerdictGoto, Value: "service-1"}},
	{Element: Element{Key: "\x0a\x60\x00\x0a", Verdict: true, Code: expr.VerdictDrop}},
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

// User data that says it is longer than it is, which anyone may write who may write nftables, ends no agent: the element is
// not ours, and is taken away.
func TestUserDataThatLies(t *testing.T) {
	_, path := linktest.NamespaceAt(t)
	c, err := Open(path)
	testenv.Must(t, err)
	t.Cleanup(c.Close)
	h := NewPlain(c)
	want := Table{Name: "t", Sets: []*Set{{Name: "s", Key: nftables.TypeIPAddr}}, Elements: map[string][]Element{"s": {{Key: "\x0a\x00\x00\x02"}}}}
	_, err = h.Set(want, nil)
	testenv.Must(t, err)
	lie := &messages{table: "t"}
	lie.close(lie.frame(unix.NFNL_MSG_BATCH_BEGIN, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, 0, "begin the transaction"))
	at := lie.message(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, "lie")
	lie.text(unix.NFTA_SET_ELEM_LIST_TABLE, "t")
	lie.text(unix.NFTA_SET_ELEM_LIST_SET, "s")
	all := lie.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	one := lie.nest(unix.NFTA_LIST_ELEM)
	key := lie.nest(unix.NFTA_SET_ELEM_KEY)
	lie.bytes(unix.NFTA_DATA_VALUE, []byte{10, 0, 0, 3})
	lie.unnest(key)
	lie.bytes(unix.NFTA_SET_ELEM_USERDATA, []byte{byte(userdata.NFTNL_UDATA_SET_ELEM_COMMENT), 200, 'x'})
	lie.unnest(one)
	lie.unnest(all)
	lie.close(at)
	testenv.Must(t, c.commit(lie))
	for _, changes := range []diff.Count{{Removed: 1}, {}} {
		if got, err := h.Set(want, nil); err != nil || got != changes {
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
		size := len(e.Key) + len(e.KeyEnd) + len(e.Value) + len(e.Comment)
		if size > len(b) {
			t.Fatalf("%d bytes are read out of %d: %+v", size, len(b), e)
		}
		// One that fits into a message again is the same when it is read again.
		if size < 200 && e.Key != "" && !strings.ContainsRune(e.Comment, 0) && (!e.Verdict || !strings.ContainsRune(e.Value, 0)) {
			if again := elementOf(elementMessage(e)); again != e {
				t.Errorf("%+v is read again as %+v", e, again)
			}
		}
	})
}
