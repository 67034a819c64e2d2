package machine

import (
	"bytes"
	"encoding/json"
	"io"
	"reflect"
	"strings"
	"testing"
)

// endless is a message that does not end, and counts what is read of it.
type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	n := copy(p, strings.Repeat("x", len(p)))
	if e.read == 0 {
		copy(p, `{"op":"`)
	}
	e.read += n
	return n, nil
}

func TestMessagesAreBounded(t *testing.T) {
	for name, decode := range map[string]func(io.Reader) error{
		"request":  func(r io.Reader) error { _, err := DecodeRequest(r); return err },
		"response": func(r io.Reader) error { _, err := DecodeResponse(r); return err },
	} {
		e := &endless{}
		if err := decode(e); err == nil || !strings.Contains(err.Error(), "65536 bytes") || e.read > 2*MaxMessage {
			t.Errorf("%s without an end: %v after %d bytes", name, err, e.read)
		}
	}
}

func FuzzMessages(f *testing.F) {
	f.Add([]byte(`{"op":"start","service":"kubelet"}`))
	f.Add([]byte(`{"services":[{"name":"kubelet","pid":7,"ready":true,"restarts":1,"lastExit":"exit status 1"}]}`))
	f.Add([]byte(`{"error":"no service \"x\""}{`))
	f.Fuzz(func(t *testing.T, data []byte) {
		request, err := DecodeRequest(bytes.NewReader(data))
		check(t, request, err, DecodeRequest)
		response, err := DecodeResponse(bytes.NewReader(data))
		check(t, response, err, DecodeResponse)
	})
}

// check says whether there is exactly one of message and error, and whether the message is the same when it is sent on.
func check[M any](t *testing.T, message M, err error, decode func(io.Reader) (M, error)) {
	t.Helper()
	if err != nil {
		if !reflect.ValueOf(message).IsZero() {
			t.Errorf("both %+v and %v", message, err)
		}
		return
	}
	var sent bytes.Buffer
	if err := json.NewEncoder(&sent).Encode(message); err != nil {
		t.Fatal(err)
	}
	if sent.Len() > MaxMessage {
		return
	}
	again, err := decode(&sent)
	var twice bytes.Buffer
	if err != nil || json.NewEncoder(&twice).Encode(again) != nil {
		t.Fatalf("%+v is read again as %+v, %v", message, again, err)
	}
}
