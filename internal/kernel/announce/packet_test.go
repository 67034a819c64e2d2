package announce

import (
	"bytes"
	"encoding/hex"
	"net/netip"
	"testing"
)

var own = [6]byte{2, 0, 0, 0, 0, 0x11}

// Frames as Linux sends them.
const (
	request = "ffffffffffff" + "020000000001" + "0806" + "0001080006040001" + "020000000001" + "c0000201" + "000000000000" + "c0000250"
	claim   = "ffffffffffff" + "020000000001" + "0806" + "0001080006040001" + "020000000001" + "c0000250" + "000000000000" + "c0000250"
	reply   = "020000000001" + "020000000011" + "0806" + "0001080006040002" + "020000000011" + "c0000250" + "020000000001" + "c0000201"
	ask6    = "3333ff000080" + "020000000001" + "86dd" + "6000000000203aff" + "20010db8000000000000000000000001" + "ff0200000000000000000001ff000080" +
		"87000000" + "00000000" + "20010db8000000000000000000000080" + "0101020000000001"
	probe6 = "3333ff000080" + "020000000001" + "86dd" + "6000000000183aff" + "00000000000000000000000000000000" + "ff0200000000000000000001ff000080" +
		"87000000" + "00000000" + "20010db8000000000000000000000080"
)

func frame(t testing.TB, s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParse(t *testing.T) {
	q, ok := parse(frame(t, request))
	if !ok || q.target != netip.MustParseAddr("192.0.2.80") {
		t.Fatalf("%v %+v", ok, q)
	}
	if got := hex.EncodeToString(q.answer(own)); got != reply {
		t.Errorf("the answer is\n%s, want\n%s", got, reply)
	}
	if _, ok := parse(frame(t, claim)); ok {
		t.Error("somebody else's claim is taken for a question")
	}
	for name, s := range map[string]string{"to a node": ask6, "before an address is used": probe6} {
		q, ok = parse(frame(t, s))
		if !ok || q.target != netip.MustParseAddr("2001:db8::80") || q.asker != [6]byte{2, 0, 0, 0, 0, 1} {
			t.Fatalf("%s: %v %+v", name, ok, q)
		}
		answer := q.answer(own)
		to := netip.AddrFrom16([16]byte(answer[etherHeader+24 : etherHeader+40]))
		if s == ask6 && to != q.from || s == probe6 && to != allNodes {
			t.Errorf("%s: answered to %s", name, to)
		}
		if sum := checksum(q.target, to, answer[etherHeader+ip6Header:]); sum != 0 {
			t.Errorf("%s: the checksum is wrong by %x", name, sum)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{request, claim, reply, ask6, probe6, ""} {
		f.Add(frame(f, s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		kept := bytes.Clone(b)
		q, ok := parse(b)
		if !bytes.Equal(kept, b) {
			t.Error("the frame was changed")
		}
		if !ok {
			return
		}
		if !q.target.IsValid() || q.target.IsMulticast() && q.target.Is6() || !unicast(q.asker) {
			t.Errorf("%+v is a question", q)
		}
		if answer := q.answer(own); len(answer) < 42 || [6]byte(answer[6:12]) != own {
			t.Errorf("%+v is answered by %x", q, answer)
		}
		if _, again := parse(q.answer(own)); again {
			t.Error("an answer is a question")
		}
	})
}
