package stored

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"reflect"
	"regexp"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Rewriter changes the texts and times of objects, wherever in them these stand. Without Time, times stay as they are.
type Rewriter struct {
	Text func(string) string
	Time func(time.Time) time.Time
}

var (
	timeType      = reflect.TypeFor[metav1.Time]()
	microTimeType = reflect.TypeFor[metav1.MicroTime]()
	quantityType  = reflect.TypeFor[resource.Quantity]()
	fieldsType    = reflect.TypeFor[metav1.FieldsV1]()
)

// Value rewrites what can be set in v: an object's fields and all that they lead to. Keys of maps are names, and stay.
func (r Rewriter) Value(v reflect.Value) {
	switch v.Type() {
	case timeType:
		if t := v.Addr().Interface().(*metav1.Time); r.Time != nil && !t.IsZero() {
			t.Time = r.Time(t.Time)
		}
		return
	case microTimeType:
		if t := v.Addr().Interface().(*metav1.MicroTime); r.Time != nil && !t.IsZero() {
			t.Time = r.Time(t.Time)
		}
		return
	case fieldsType:
		f := v.Addr().Interface().(*metav1.FieldsV1)
		f.SetRawString(r.Text(f.GetRawString()))
		return
	case quantityType:
		return
	}
	switch v.Kind() {
	case reflect.String:
		if s := v.String(); s != "" {
			v.SetString(r.Text(s))
		}
	case reflect.Pointer, reflect.Interface:
		if !v.IsNil() {
			r.Value(v.Elem())
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Field(i); f.CanSet() {
				r.Value(f)
			}
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			if v.Len() > 0 {
				v.SetBytes([]byte(r.Text(string(v.Bytes()))))
			}
			return
		}
		for i := range v.Len() {
			r.Value(v.Index(i))
		}
	case reflect.Map:
		for _, key := range v.MapKeys() {
			e := reflect.New(v.Type().Elem()).Elem()
			e.Set(v.MapIndex(key))
			r.Value(e)
			v.SetMapIndex(key, e)
		}
	}
}

// JSON rewrites an object that is stored as JSON.
func (r Rewriter) JSON(data []byte) ([]byte, error) {
	var object any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&object); err != nil {
		return nil, err
	}
	return json.Marshal(r.decoded(object))
}

func (r Rewriter) decoded(v any) any {
	switch v := v.(type) {
	case string:
		if t, err := time.Parse(time.RFC3339, v); err == nil {
			if r.Time == nil {
				return v
			}
			return r.Time(t).UTC().Format(time.RFC3339)
		}
		return r.Text(v)
	case []any:
		for i := range v {
			v[i] = r.decoded(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = r.decoded(v[k])
		}
	}
	return v
}

// addressLike is what may be an IP address, with what stands around one in a URL or a list left out as far as can be.
var addressLike = regexp.MustCompile(`[0-9a-fA-F]*[.:][0-9a-fA-F.:]*(?:[0-9a-fA-F]|::)`)

// MoveAddresses returns the text with each address of one of the ranges from moved to the same place in the range of to. The
// ranges of a pair are equally large.
func MoveAddresses(s string, from, to []netip.Prefix) string {
	if !strings.ContainsAny(s, ".:") {
		return s
	}
	return addressLike.ReplaceAllStringFunc(s, func(token string) string {
		if a, err := netip.ParseAddr(token); err == nil {
			if moved, ok := move(a, from, to); ok {
				return moved.String()
			}
			return token
		}
		if p, err := netip.ParseAddrPort(token); err == nil {
			if moved, ok := move(p.Addr(), from, to); ok {
				return netip.AddrPortFrom(moved, p.Port()).String()
			}
		}
		return token
	})
}

func move(a netip.Addr, from, to []netip.Prefix) (netip.Addr, bool) {
	for i, p := range from {
		if !p.IsValid() || !p.Contains(a) || !to[i].IsValid() || to[i].Bits() != p.Bits() {
			continue
		}
		bytes, network := a.AsSlice(), to[i].Masked().Addr().AsSlice()
		for bit := range p.Bits() {
			mask := byte(0x80) >> (bit % 8)
			bytes[bit/8] = bytes[bit/8]&^mask | network[bit/8]&mask
		}
		moved, _ := netip.AddrFromSlice(bytes)
		return moved, true
	}
	return netip.Addr{}, false
}
